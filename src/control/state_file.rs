//! Files that are replaced whole, and read without trust.

use std::fs::{File, Metadata, OpenOptions, Permissions};
use std::io::{self, BufWriter, Read, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::path::Path;

/// Others may write.
const WORLD_WRITABLE: u32 = 0o002;

/// Replaces the file at `path` by one with `text`, or leaves it as it is: a reader sees the old text or the new, also
/// after a crash. The parent directories are made with `dir_mode`. A link at `path` is replaced, not followed.
///
/// # Errors
/// The file cannot be written; an old one is left as it was.
pub fn replace(path: &Path, text: &str, mode: u32, dir_mode: u32) -> io::Result<()> {
    replace_with(path, mode, dir_mode, |file| file.write_all(text.as_bytes()))
}

/// As [`replace`], by one with what `write` writes, which may come in small pieces.
///
/// # Errors
/// As [`replace`], and those of `write`.
pub fn replace_with(
    path: &Path,
    mode: u32,
    dir_mode: u32,
    write: impl FnOnce(&mut BufWriter<&File>) -> io::Result<()>,
) -> io::Result<()> {
    let dir = match path.parent() {
        Some(dir) if !dir.as_os_str().is_empty() => dir,
        Some(_) | None => Path::new("."),
    };
    std::fs::DirBuilder::new()
        .recursive(true)
        .mode(dir_mode)
        .create(dir)?;
    let file = tempfile::NamedTempFile::new_in(dir)?;
    let mut buffer = BufWriter::new(file.as_file());
    write(&mut buffer)?;
    buffer.flush()?;
    drop(buffer);
    file.as_file().set_permissions(Permissions::from_mode(mode))?;
    file.as_file().sync_all()?;
    file.persist(path).map_err(|error| error.error)?;
    File::open(dir)?.sync_all()
}

/// Reads a regular file of at most `limit` bytes that not everybody may write; never waits for a FIFO.
///
/// # Errors
/// It is not there, not such a file, or no text.
pub fn read(path: &Path, limit: u64) -> io::Result<String> {
    read_with_metadata(path, limit).map(|(text, _)| text)
}

/// As [`read`], with what the file system says of the very file that was read.
///
/// # Errors
/// As [`read`].
pub fn read_with_metadata(path: &Path, limit: u64) -> io::Result<(String, Metadata)> {
    let (file, metadata) = open(path, limit)?;
    let mut text = String::new();
    let bytes = file.take(limit + 1).read_to_string(&mut text)?;
    if bytes as u64 > limit {
        return Err(too_large(limit));
    }
    Ok((text, metadata))
}

/// As [`read`], whatever the bytes.
///
/// # Errors
/// As [`read`], but for text.
pub fn read_bytes(path: &Path, limit: u64) -> io::Result<Vec<u8>> {
    let (file, _) = open(path, limit)?;
    let mut bytes = Vec::new();
    file.take(limit + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > limit {
        return Err(too_large(limit));
    }
    Ok(bytes)
}

fn open(path: &Path, limit: u64) -> io::Result<(File, Metadata)> {
    let file = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(path)?;
    let metadata = file.metadata()?;
    if !metadata.is_file() {
        return Err(io::Error::other("not a regular file"));
    }
    if metadata.permissions().mode() & WORLD_WRITABLE != 0 {
        return Err(io::Error::other("everybody may write it (chmod o-w)"));
    }
    if metadata.len() > limit {
        return Err(too_large(limit));
    }
    Ok((file, metadata))
}

fn too_large(limit: u64) -> io::Error {
    io::Error::other(format!("larger than {limit} bytes"))
}
