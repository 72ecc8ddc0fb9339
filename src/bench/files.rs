//! Output files that are either complete or absent.

use std::io::{BufWriter, Write};
use std::path::Path;

use anyhow::Context;
use serde::Serialize;
use serde_json::Serializer;
use serde_json::ser::PrettyFormatter;
use tempfile::NamedTempFile;

/// Writes a file through a temporary one beside it, so that a reader never sees half of it and a failure
/// (a full disk) leaves what was there before. Something that is no regular file, such as /dev/stdout, is
/// written to directly.
pub fn write_atomically(
    path: &Path,
    write: impl FnOnce(&mut dyn Write) -> std::io::Result<()>,
) -> anyhow::Result<()> {
    let outcome = match std::fs::metadata(path) {
        Ok(metadata) if metadata.is_dir() => Err(std::io::Error::other("is a folder")),
        Ok(metadata) if !metadata.is_file() => write_directly(path, write),
        _ => write_beside(path, write),
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
        _ => temporary_beside(path).map(drop),
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

fn write_beside(
    path: &Path,
    write: impl FnOnce(&mut dyn Write) -> std::io::Result<()>,
) -> std::io::Result<()> {
    let mut sink = BufWriter::new(temporary_beside(path)?);
    let written = write(&mut sink).and_then(|()| sink.flush());
    written.map_err(without_temporary_path)?;
    let file = sink
        .into_inner()
        .map_err(std::io::IntoInnerError::into_error)?;
    file.persist(path).map_err(|error| error.error)?;
    Ok(())
}

/// An empty temporary file in the folder of `path`.
fn temporary_beside(path: &Path) -> std::io::Result<NamedTempFile> {
    let folder = path
        .parent()
        .filter(|folder| !folder.as_os_str().is_empty())
        .unwrap_or(Path::new("."));
    let mut builder = tempfile::Builder::new();
    builder.prefix(".lathe-");
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt;
        // The umask takes off what the user does not want; tempfile's own default is 0600.
        builder.permissions(std::fs::Permissions::from_mode(0o666));
    }
    builder.tempfile_in(folder).map_err(without_temporary_path)
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

    /// /dev/full stands for a full disk.
    #[cfg(target_os = "linux")]
    #[test]
    fn a_full_disk_is_an_error() {
        let error =
            write_atomically(Path::new("/dev/full"), |sink| sink.write_all(b"x")).unwrap_err();
        assert!(format!("{error:#}").contains("No space left"), "{error:#}");
    }
}
