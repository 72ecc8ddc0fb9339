//! What the caches on disk share.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

/// Extension of files that are being written.
pub(super) const TEMPORARY: &str = "tmp";

/// 64 bits of a value. The hasher may change with the standard library; then what was kept under the
/// old bits is simply not found.
pub(super) fn fingerprint(value: &(impl Hash + ?Sized)) -> u64 {
    let mut hasher = DefaultHasher::new();
    value.hash(&mut hasher);
    hasher.finish()
}

/// Where users keep files of the program who have no home: a folder among temporary files that carries their number.
/// [`private_folder`] makes it, and refuses one that somebody else has put there.
pub(super) fn private_temporary() -> PathBuf {
    #[cfg(unix)]
    let name = format!("lathe-{}", user());
    #[cfg(not(unix))]
    let name = "lathe";
    std::env::temp_dir().join(name)
}

/// The user that files of this process belong to.
#[cfg(unix)]
fn user() -> u32 {
    // SAFETY: geteuid has no preconditions and cannot fail.
    unsafe { libc::geteuid() }
}

/// Makes a folder with those above it, for this user alone. What lies in it is run, so a folder that others own or may
/// write into is refused, and so is one whose parent lets them put another in its place.
///
/// # Errors
/// It cannot be made, or others could change what lies in it.
pub(super) fn private_folder(dir: &Path) -> io::Result<()> {
    let mut builder = std::fs::DirBuilder::new();
    builder.recursive(true);
    #[cfg(unix)]
    {
        use std::os::unix::fs::DirBuilderExt;
        builder.mode(0o700);
    }
    builder.create(dir)?;
    #[cfg(unix)]
    {
        use std::os::unix::fs::{MetadataExt, PermissionsExt};
        let others = |reason: String| Err(io::Error::new(io::ErrorKind::PermissionDenied, reason));
        let found = std::fs::metadata(dir)?;
        let mode = found.permissions().mode();
        if found.uid() != user() {
            return others(format!(
                "belongs to user {}, not to {}",
                found.uid(),
                user()
            ));
        }
        if mode & 0o022 != 0 {
            let mode = mode & 0o777;
            return others(format!(
                "others may write into it (mode {mode:o}, expected 700)"
            ));
        }
        if mode & 0o777 != 0o700 {
            std::fs::set_permissions(dir, std::fs::Permissions::from_mode(0o700))?;
        }
        let Some(parent) = dir.canonicalize()?.parent().map(Path::to_owned) else {
            return Ok(());
        };
        let above = std::fs::metadata(&parent)?;
        let mode = above.permissions().mode();
        // Where the sticky bit is set, as in /tmp, nobody can replace what is not theirs.
        let replaceable = mode & 0o022 != 0 && mode & 0o1000 == 0;
        if replaceable || ![0, user()].contains(&above.uid()) {
            return others(format!(
                "others may replace it ({} has mode {:o} and belongs to user {})",
                parent.display(),
                mode & 0o7777,
                above.uid()
            ));
        }
    }
    Ok(())
}

/// Puts a file in the place of another, whole or not at all.
///
/// # Errors
/// It cannot be written; what was there before stays.
pub(super) fn replace(path: &Path, parts: &[&[u8]]) -> std::io::Result<()> {
    static COUNTER: AtomicU64 = AtomicU64::new(0);
    let unique = COUNTER.fetch_add(1, Ordering::Relaxed);
    let temporary = path.with_extension(format!("{}.{unique}.{TEMPORARY}", std::process::id()));
    let write = || -> std::io::Result<()> {
        let mut file = std::fs::File::create(&temporary)?;
        parts.iter().try_for_each(|part| file.write_all(part))?;
        drop(file);
        std::fs::rename(&temporary, path)
    };
    write().inspect_err(|_| {
        let _ = std::fs::remove_file(&temporary);
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_replaced_or_stays() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.json");
        replace(&path, &[b"old"]).unwrap();
        replace(&path, &[b"n", b"ew"]).unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"new");
        // A folder cannot be replaced by a file; nothing is left behind.
        let taken = dir.path().join("taken");
        std::fs::create_dir(&taken).unwrap();
        assert!(replace(&taken, &[b"x"]).is_err());
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 2);
    }

    #[cfg(unix)]
    #[test]
    fn folders_that_others_can_change_are_refused() {
        use std::os::unix::fs::PermissionsExt;
        let dir = tempfile::tempdir().unwrap();
        let set = |path: &Path, mode| {
            std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap();
        };
        let mode = |path: &Path| std::fs::metadata(path).unwrap().permissions().mode() & 0o7777;
        let (above, cache) = (dir.path().join("a"), dir.path().join("a/cubins"));
        private_folder(&cache).unwrap();
        assert_eq!((mode(&above), mode(&cache)), (0o700, 0o700));
        // An older folder becomes private.
        set(&cache, 0o755);
        private_folder(&cache).unwrap();
        assert_eq!(mode(&cache), 0o700);
        for open in [0o777, 0o770, 0o702, 0o1777] {
            set(&cache, open);
            let error = private_folder(&cache).unwrap_err().to_string();
            assert!(error.starts_with("others may write into it"), "{error}");
        }
        set(&cache, 0o700);
        set(&above, 0o777);
        let error = private_folder(&cache).unwrap_err().to_string();
        assert!(error.starts_with("others may replace it"), "{error}");
        set(&above, 0o1777);
        private_folder(&cache).unwrap();
        assert!(private_folder(Path::new("/dev/null/x")).is_err());
    }

    /// Only root can make a folder that belongs to somebody else.
    #[cfg(unix)]
    #[test]
    fn folders_of_others_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        if user() != 0 {
            return;
        }
        std::os::unix::fs::chown(dir.path(), Some(12345), None).unwrap();
        let error = private_folder(dir.path()).unwrap_err().to_string();
        assert_eq!(error, "belongs to user 12345, not to 0");
        let inside = private_folder(&dir.path().join("cubins")).unwrap_err();
        assert!(
            inside.to_string().contains("belongs to user 12345"),
            "{inside}"
        );
    }

    #[cfg(unix)]
    #[test]
    fn without_a_home_the_folder_carries_the_users_number() {
        let name = private_temporary();
        assert!(name.ends_with(format!("lathe-{}", user())), "{name:?}");
    }
}
