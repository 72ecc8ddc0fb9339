//! Output files that are either complete or absent.

use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use anyhow::Context;
use serde::Serialize;
use serde_json::Serializer;
use serde_json::ser::PrettyFormatter;
use tempfile::NamedTempFile;

/// Writes a file through a temporary one beside it, so that a reader never sees half of it and a failure
/// (a full disk) leaves what was there before. What a link points to is replaced, not the link; the new file has the
/// permissions of the old one, and lies on the disk when this returns. Something that is no regular file, such as
/// /dev/stdout, is written to directly.
pub fn write_atomically(
    path: &Path,
    write: impl FnOnce(&mut dyn Write) -> std::io::Result<()>,
) -> anyhow::Result<()> {
    let outcome = match std::fs::metadata(path) {
        Ok(metadata) if metadata.is_dir() => Err(std::io::Error::other("is a folder")),
        Ok(metadata) if !metadata.is_file() => write_directly(path, write),
        _ => write_beside(path, |file| Box::new(file), write),
    };
    outcome.with_context(|| format!("{} cannot be written", path.display()))
}

/// Checks that [`write_atomically`] will be able to create a file here: found before a long run, not after it.
///
/// # Errors
/// The path is a folder, its folder is absent or read-only.
pub fn check_writable(path: &Path) -> anyhow::Result<()> {
    let outcome = match std::fs::metadata(path) {
        Ok(metadata) if metadata.is_dir() => Err(std::io::Error::other("is a folder")),
        Ok(metadata) if !metadata.is_file() => Ok(()),
        _ => target(path)
            .and_then(|target| temporary_beside(&target))
            .map(drop),
    };
    outcome.with_context(|| format!("{} cannot be written", path.display()))
}

/// Writes a value as JSON, as [`write_atomically`] does, each level indented by `indent`.
pub fn write_json(path: &Path, indent: &[u8], value: &impl Serialize) -> anyhow::Result<()> {
    write_atomically(path, |sink| {
        let formatter = PrettyFormatter::with_indent(indent);
        value.serialize(&mut Serializer::with_formatter(&mut *sink, formatter))?;
        sink.write_all(b"\n")
    })
}

fn write_directly(
    path: &Path,
    write: impl FnOnce(&mut dyn Write) -> std::io::Result<()>,
) -> std::io::Result<()> {
    let mut sink = BufWriter::new(std::fs::OpenOptions::new().write(true).open(path)?);
    write(&mut sink)?;
    sink.flush()
}

/// Tests put something between the file and what is written.
fn write_beside(
    path: &Path,
    through: impl FnOnce(&mut std::fs::File) -> Box<dyn Write + '_>,
    write: impl FnOnce(&mut dyn Write) -> std::io::Result<()>,
) -> std::io::Result<()> {
    let target = target(path)?;
    let mut temporary = temporary_beside(&target)?;
    let file = temporary.as_file_mut();
    if let Ok(old) = std::fs::metadata(&target) {
        keep_access(file, &old)?;
    }
    let mut sink = BufWriter::new(through(file));
    let written = write(&mut sink).and_then(|()| sink.flush());
    // What is left in the buffer after an error is not tried again.
    let (_, _) = sink.into_parts();
    written.map_err(without_temporary_path)?;
    file.sync_all()?;
    temporary.persist(&target).map_err(|error| error.error)?;
    // The name, too; where folders cannot be synchronised the file is complete nevertheless.
    #[cfg(unix)]
    if let Ok(folder) = std::fs::File::open(folder_of(&target)) {
        let _ = folder.sync_all();
    }
    Ok(())
}

/// The file that is meant: what a link leads to, even where there is nothing yet.
fn target(path: &Path) -> std::io::Result<PathBuf> {
    /// Links in a row that are followed, as by the system.
    const MOST: usize = 40;
    let mut path = path.to_owned();
    for _ in 0..MOST {
        match std::fs::read_link(&path) {
            // A relative link starts in its own folder; `join` takes an absolute one as it is.
            Ok(next) => path = folder_of(&path).join(next),
            Err(_) => return Ok(path),
        }
    }
    Err(std::io::Error::other("too many links in a row"))
}

/// Gives a new file the permissions of the one whose place it takes, and its owner where that is allowed.
fn keep_access(file: &std::fs::File, old: &std::fs::Metadata) -> std::io::Result<()> {
    #[cfg(unix)]
    {
        use std::os::unix::fs::{MetadataExt, fchown};
        let new = file.metadata()?;
        if (new.uid(), new.gid()) != (old.uid(), old.gid()) {
            // Only root may give a file away.
            let _ = fchown(file, Some(old.uid()), Some(old.gid()));
        }
    }
    file.set_permissions(old.permissions())
}

fn folder_of(path: &Path) -> &Path {
    path.parent()
        .filter(|folder| !folder.as_os_str().is_empty())
        .unwrap_or(Path::new("."))
}

/// An empty temporary file in the folder of `path`, which nobody may read whom the file in its place does not let.
fn temporary_beside(path: &Path) -> std::io::Result<NamedTempFile> {
    let mut builder = tempfile::Builder::new();
    builder.prefix(".lathe-");
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt;
        let old = std::fs::metadata(path).ok().filter(|old| old.is_file());
        let mode = old.map_or(0o666, |old| old.permissions().mode() & 0o600);
        // The umask takes off what the user does not want; tempfile's own default is 0600.
        builder.permissions(std::fs::Permissions::from_mode(mode));
    }
    builder
        .tempfile_in(folder_of(path))
        .map_err(without_temporary_path)
}

/// What the system said, without the temporary file's name, which nobody knows.
fn without_temporary_path(error: std::io::Error) -> std::io::Error {
    match error.to_string().rsplit_once(" at path ") {
        Some((reason, _)) => std::io::Error::new(error.kind(), reason),
        None => error,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failure_leaves_the_old_file_and_no_other() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("report.json");
        write_atomically(&path, |sink| sink.write_all(b"old")).unwrap();
        let error = write_atomically(&path, |sink| {
            sink.write_all(b"half")?;
            Err(std::io::Error::from(std::io::ErrorKind::StorageFull))
        })
        .unwrap_err();
        assert!(
            format!("{error:#}").contains("report.json cannot be written: "),
            "{error:#}"
        );
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "old");
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_missing_folder_is_an_error() {
        let folder = tempfile::tempdir().unwrap();
        let absent = folder.path().join("none/x");
        let expected = format!(
            "{} cannot be written: No such file or directory (os error 2)",
            absent.display()
        );
        for found in [
            write_atomically(&absent, |_| Ok(())),
            check_writable(&absent),
        ] {
            assert_eq!(format!("{:#}", found.unwrap_err()), expected);
        }
        assert!(write_atomically(folder.path(), |_| Ok(())).is_err());
        assert!(check_writable(folder.path()).is_err());
    }

    #[test]
    fn a_check_leaves_nothing_behind() {
        let folder = tempfile::tempdir().unwrap();
        check_writable(&folder.path().join("x")).unwrap();
        check_writable(Path::new("/dev/null")).unwrap();
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
    }

    /// A disk that fails at a call: of writing, or of flushing.
    struct Faulty<'a> {
        file: &'a mut std::fs::File,
        calls: usize,
        fails_at: usize,
    }

    impl Faulty<'_> {
        fn call(&mut self) -> std::io::Result<()> {
            self.calls += 1;
            match self.calls == self.fails_at {
                true => Err(std::io::Error::from_raw_os_error(28)),
                false => Ok(()),
            }
        }
    }

    impl Write for Faulty<'_> {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.call()?;
            // Never all of it.
            self.file.write(&bytes[..bytes.len().div_ceil(2)])
        }

        fn flush(&mut self) -> std::io::Result<()> {
            self.call()?;
            self.file.flush()
        }
    }

    /// Whichever call fails: the old file stays, nothing else is left, and the reason is said.
    #[test]
    fn an_error_at_any_call_loses_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("report.json");
        let text = "0123456789".repeat(4000);
        let write = |fails_at| {
            let pieces = |sink: &mut dyn Write| {
                let mut pieces = text.as_bytes().chunks(700);
                pieces.try_for_each(|piece| sink.write_all(piece))
            };
            let calls = 0;
            write_beside(
                &path,
                |file| {
                    Box::new(Faulty {
                        file,
                        calls,
                        fails_at,
                    })
                },
                pieces,
            )
        };
        std::fs::write(&path, "old").unwrap();
        let mut n_failed = 0;
        while let Err(error) = write(n_failed + 1) {
            n_failed += 1;
            assert!(error.to_string().contains("No space left"), "{error}");
            assert_eq!(std::fs::read_to_string(&path).unwrap(), "old");
            assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
        }
        assert!(n_failed > 20, "{n_failed} calls");
        assert_eq!(std::fs::read_to_string(&path).unwrap(), text);
    }

    #[cfg(unix)]
    #[test]
    fn permissions_and_links_stay() {
        use std::os::unix::fs::{PermissionsExt, symlink};
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        std::fs::create_dir(at("far")).unwrap();
        let real = at("far/report.json");
        std::fs::write(&real, "old").unwrap();
        for mode in [0o600, 0o640, 0o604] {
            std::fs::set_permissions(&real, std::fs::Permissions::from_mode(mode)).unwrap();
            symlink("far/report.json", at("link")).unwrap();
            symlink(at("link"), at("link of a link")).unwrap();
            check_writable(&at("link of a link")).unwrap();
            write_atomically(&at("link of a link"), |sink| sink.write_all(b"new")).unwrap();
            assert!(at("link").is_symlink() && at("link of a link").is_symlink());
            assert_eq!(std::fs::read_to_string(&real).unwrap(), "new");
            let found = std::fs::metadata(&real).unwrap().permissions().mode();
            assert_eq!(found & 0o7777, mode);
            std::fs::remove_file(at("link")).unwrap();
            std::fs::remove_file(at("link of a link")).unwrap();
        }
        symlink("far/absent", at("to nothing")).unwrap();
        write_atomically(&at("to nothing"), |sink| sink.write_all(b"x")).unwrap();
        assert_eq!(std::fs::read_to_string(at("far/absent")).unwrap(), "x");
        symlink("circle", at("circle")).unwrap();
        assert!(write_atomically(&at("circle"), |_| Ok(())).is_err());
        assert_eq!(std::fs::read_dir(at("far")).unwrap().count(), 2);
    }

    /// /dev/full stands for a full disk.
    #[cfg(target_os = "linux")]
    #[test]
    fn a_full_disk_is_an_error() {
        let error =
            write_atomically(Path::new("/dev/full"), |sink| sink.write_all(b"x")).unwrap_err();
        assert!(format!("{error:#}").contains("No space left"), "{error:#}");
    }
}
