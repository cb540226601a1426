//! A value made from files, made anew when they change.
//!
//! The files are looked at whenever the value is asked for: a `stat` each, a few microseconds, and no clock and no task.
//! They have changed when device, inode, size or time of change of any of them has; so an edit in place is seen, a rename
//! over the file, and a link that leads elsewhere, as Kubernetes replaces mounted secrets.
//!
//! A change that makes no good value is told once and leaves the old value in use: a certificate and its key are two files
//! and never replaced at the same moment. It is tried again each time until it is good.

use std::fmt;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use super::TrustError;

/// What tells one state of a file from another; `None` if it is not there.
type Stamp = Option<(u64, u64, u64, i64, i64)>;

/// The value and the files it comes from.
pub struct Reload<T> {
    /// What it is, for log lines.
    what: &'static str,
    files: Vec<PathBuf>,
    load: Box<dyn Fn() -> Result<T, TrustError> + Send + Sync>,
    held: Mutex<Held<T>>,
}

struct Held<T> {
    value: Arc<T>,
    /// The files as they were when `value` was made.
    stamps: Vec<Stamp>,
    /// What was last told about a newer state of them that is no good.
    complaint: Option<String>,
}

impl<T> Reload<T> {
    /// Makes the value for the first time; `load` reads `files`.
    ///
    /// # Errors
    /// What `load` says.
    pub fn open(
        what: &'static str,
        files: Vec<PathBuf>,
        load: impl Fn() -> Result<T, TrustError> + Send + Sync + 'static,
    ) -> Result<Self, TrustError> {
        // Looked at before they are read: a change in between is seen later.
        let stamps = stamps(&files);
        let value = Arc::new(load()?);
        Ok(Self {
            what,
            files,
            load: Box::new(load),
            held: Mutex::new(Held {
                value,
                stamps,
                complaint: None,
            }),
        })
    }

    /// The value, of the files as they are, or of the last good state of them.
    pub fn current(&self) -> Arc<T> {
        let mut held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        let stamps = stamps(&self.files);
        if held.stamps == stamps {
            return Arc::clone(&held.value);
        }
        match (self.load)() {
            Ok(value) => {
                tracing::info!(what = self.what, "files have changed and are used from now on");
                *held = Held {
                    value: Arc::new(value),
                    stamps,
                    complaint: None,
                };
            }
            Err(error) => {
                let complaint = error.to_string();
                if held.complaint.as_ref() != Some(&complaint) {
                    tracing::warn!(
                        what = self.what,
                        "files have changed and are no good, the previous ones stay in use: {complaint}"
                    );
                    held.complaint = Some(complaint);
                }
            }
        }
        Arc::clone(&held.value)
    }
}

impl<T> fmt::Debug for Reload<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Reload")
            .field("what", &self.what)
            .field("files", &self.files)
            .finish_non_exhaustive()
    }
}

fn stamps(files: &[PathBuf]) -> Vec<Stamp> {
    let stamp = |file: &PathBuf| {
        let meta = fs::metadata(file).ok()?;
        Some((
            meta.dev(),
            meta.ino(),
            meta.size(),
            meta.ctime(),
            meta.ctime_nsec(),
        ))
    };
    files.iter().map(stamp).collect()
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    #[test]
    fn a_changed_file_is_read_again_and_a_bad_one_is_not_used() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("number");
        fs::write(&file, "1").unwrap();
        let number = open(&file).unwrap();
        assert_eq!(*number.current(), 1);
        fs::write(&file, "two").unwrap();
        assert_eq!(*number.current(), 1, "what is no good is not used");
        fs::remove_file(&file).unwrap();
        assert_eq!(*number.current(), 1, "a file that is gone takes nothing away");
        fs::write(&file, "22").unwrap();
        assert_eq!(*number.current(), 22);
        let other = dir.path().join("other");
        fs::write(&other, "33").unwrap();
        fs::rename(&other, &file).unwrap();
        assert_eq!(*number.current(), 33, "a file renamed over it is seen");
    }

    #[test]
    fn a_link_that_leads_elsewhere_is_a_change() {
        let dir = tempfile::tempdir().unwrap();
        let (link, next) = (dir.path().join("link"), dir.path().join("next"));
        for number in ["1", "2"] {
            fs::write(dir.path().join(number), number).unwrap();
        }
        std::os::unix::fs::symlink("1", &link).unwrap();
        let number = open(&link).unwrap();
        std::os::unix::fs::symlink("2", &next).unwrap();
        fs::rename(&next, &link).unwrap();
        assert_eq!(*number.current(), 2);
    }

    #[test]
    fn at_first_there_must_be_something_good() {
        assert!(open(Path::new("/nonexistent/number")).is_err());
    }

    fn open(file: &Path) -> Result<Reload<u32>, TrustError> {
        let path = file.to_owned();
        let load = move || {
            let text = super::super::read_text(&path)?;
            text.parse().map_err(|_| TrustError::Content {
                path: path.clone(),
                problem: "is no number".to_owned(),
            })
        };
        Reload::open("number", vec![file.to_owned()], load)
    }
}
