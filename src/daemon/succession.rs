//! From one process to the next: who asks whom for the device and sockets, and when the old one ends.
//!
//! [`host::handover`](crate::host::handover) has the descriptors and the words; here is the order of things:
//!
//! ```text
//!  successor: --takeover              daemon that runs
//!  asks, before all else     ───────▶ parks the threads, ends everything else: store, status socket, ports
//!                            ◀─────── gives; from here it only waits
//!  starts as always, on what it was given
//!  is ready                  ───────▶ ends its threads and itself
//!  (goes away)                        starts again, on what it still has
//! ```
//!
//! What the process holds is one for all networks, by the name of the device; so it is a value of the process.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use nix::sys::socket::{getsockopt, sockopt};
use nix::unistd::Uid;
use tokio::net::UnixListener;
use tokio::time::sleep;

use crate::daemon::StopSignals;
use crate::daemon::claims::Claims;
use crate::daemon::health::Health;
use crate::host::handover::{self, Given, Handover, Wish};
use crate::options::{self, Predecessor, RunOptions};

static HELD: OnceLock<Handover> = OnceLock::new();

/// What this process holds for the next data plane, and the next process.
pub(super) fn held() -> &'static Handover {
    HELD.get_or_init(Handover::default)
}

/// Where a successor asks: beside the status socket.
fn socket_path(status_socket: &Path) -> PathBuf {
    let mut path = status_socket.as_os_str().to_owned();
    path.push(".takeover");
    PathBuf::from(path)
}

/// Takes what a service manager kept and, if it was asked for, what the daemon has that runs. To be called once, before anything else.
///
/// # Errors
/// The daemon that runs does not hand over.
pub(super) fn arrive(options: &RunOptions) -> io::Result<()> {
    let process = &options.process;
    let kept = handover::from_service_manager();
    if process.handover == options::Handover::Off {
        // What was kept is closed; the device goes.
        let _ = HELD.set(Handover::off(kept));
        return Ok(());
    }
    if !kept.bundles.is_empty() {
        tracing::info!(
            networks = kept.bundles.len(),
            "the service manager kept device and sockets"
        );
    }
    let (mut given, mut predecessor) = (BTreeMap::new(), None);
    if process.predecessor == Predecessor::Replace {
        match handover::ask(&socket_path(&options.status_socket))? {
            Given::Nobody => tracing::info!("no daemon runs whose place could be taken"),
            Given::Nothing(why) => {
                tracing::warn!(why, "the daemon that ran has ended; starting without what it had")
            }
            Given::Everything(bundles, stream) => {
                tracing::info!(
                    devices = bundles.len(),
                    "taking the place of the daemon that runs"
                );
                given = bundles;
                predecessor = Some(stream);
            }
        }
    }
    let devices = devices(options);
    // What no network here will take stays busy for as long as somebody has it, be it the daemon whose place is taken.
    let gives_too_much = given.keys().any(|device| !devices.contains(device));
    let held = Handover::new(kept, given, predecessor);
    let unwanted = held.retain(|device| devices.contains(device));
    if !unwanted.is_empty() {
        tracing::info!(
            devices = unwanted.join(" "),
            "these devices are no network's any more"
        );
    }
    if gives_too_much {
        held.tell_stop();
    }
    let _ = HELD.set(held);
    Ok(())
}

/// The devices that networks here may have from before.
fn devices(options: &RunOptions) -> BTreeSet<String> {
    let like = &options.packet_path.device;
    match &options.networks {
        None => [like.clone()].into(),
        Some(_) => Claims::load(&options.data_dir).devices(like),
    }
}

/// Tells the predecessor, once all is ready, that it may go.
pub(super) async fn relieve_predecessor(health: Arc<Health>) {
    while held().has_predecessor() {
        // Firewall rules that cannot be made, the predecessor cannot make either.
        if health.is_up() {
            tracing::info!("the place of the daemon that ran is taken");
            held().tell_done();
        }
        sleep(Duration::from_millis(5)).await;
    }
}

/// Listens for a successor; its file goes with it.
pub(super) struct Doorbell {
    listener: UnixListener,
    path: PathBuf,
}

/// Who rang.
pub(super) enum Ring {
    /// A successor that wants everything, in this version.
    Take(UnixStream, u32),
    /// One that wants us to end.
    End,
}

impl Doorbell {
    /// Listens beside the status socket, whose owner has made sure that no other daemon does. `None` if there is to be no handover, or
    /// it cannot be: that is told, and the daemon runs.
    pub(super) fn new(options: &RunOptions) -> Option<Self> {
        if options.process.handover == options::Handover::Off {
            return None;
        }
        let path = socket_path(&options.status_socket);
        match Self::bind(&path) {
            Ok(doorbell) => Some(doorbell),
            Err(error) => {
                tracing::warn!(%error, socket = %path.display(), "no successor will be able to ask for device and sockets");
                None
            }
        }
    }

    fn bind(path: &Path) -> io::Result<Self> {
        if std::fs::symlink_metadata(path).is_ok_and(|meta| meta.file_type().is_socket()) {
            std::fs::remove_file(path)?;
        }
        let listener = UnixListener::bind(path)?;
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))?;
        Ok(Self {
            listener,
            path: path.to_owned(),
        })
    }

    /// Waits until a successor has said what it wants of us.
    pub(super) async fn rung(&self) -> Ring {
        loop {
            let accepted = self.listener.accept().await;
            let stream = match accepted.and_then(|(stream, _)| stream.into_std()) {
                Ok(stream) if may_ask(&stream) => stream,
                Ok(_) => continue,
                Err(error) => {
                    tracing::debug!(%error, "cannot hear a successor");
                    sleep(Duration::from_millis(50)).await;
                    continue;
                }
            };
            if let Some(ring) = hear(stream).await {
                return ring;
            }
        }
    }
}

impl Drop for Doorbell {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}

/// Whether whoever asks is root or who we are.
fn may_ask(stream: &UnixStream) -> bool {
    getsockopt(&stream.as_fd(), sockopt::PeerCredentials)
        .is_ok_and(|peer| peer.uid() == 0 || peer.uid() == Uid::effective().as_raw())
}

/// Hears one successor out; `None` if nothing comes of it.
async fn hear(mut stream: UnixStream) -> Option<Ring> {
    let heard = tokio::task::spawn_blocking(move || {
        stream.set_nonblocking(false)?;
        let mut wish = handover::hear(&mut stream)?;
        if wish == Wish::Refused {
            tracing::warn!("a successor speaks no version of the handover that this daemon does");
            wish = handover::hear(&mut stream)?;
        }
        io::Result::Ok((wish, stream))
    });
    match heard.await {
        Ok(Ok((Wish::Take(version), stream))) => Some(Ring::Take(stream, version)),
        Ok(Ok((Wish::End, _))) => {
            tracing::info!("{RELIEVED}");
            Some(Ring::End)
        }
        Ok(Ok((Wish::Refused | Wish::Gone, _))) => None,
        Ok(Err(error)) => {
            tracing::debug!(%error, "a successor says nothing of sense");
            None
        }
        Err(_) => None,
    }
}

/// Why a daemon ends whose place another has taken.
const RELIEVED: &str = "a successor is ready and has taken over; stopping";

/// What became of a handover.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Handed {
    /// The successor is ready, or we were asked to stop: the end.
    Over,
    /// It went away: we go on.
    Back,
}

/// Gives everything to the successor and waits until it is ready. Threads that move packets are parked; nothing else of ours runs.
pub(super) async fn hand_over(mut successor: UnixStream, version: u32, stop: &mut StopSignals) -> Handed {
    let waiting = tokio::task::spawn_blocking(move || {
        held().give(&mut successor, version)?;
        // It may wait for its store for as long as it likes.
        successor.set_read_timeout(None)?;
        handover::await_end(&mut successor)
    });
    tokio::select! {
        waited = waiting => match waited {
            Ok(Ok(Wish::End)) => {
                tracing::info!("{RELIEVED}");
                Handed::Over
            }
            Ok(Ok(Wish::Take(_) | Wish::Refused | Wish::Gone)) => {
                tracing::warn!("the successor went away; going on");
                Handed::Back
            }
            Ok(Err(error)) => {
                tracing::warn!(%error, "the successor went away in the middle; going on");
                Handed::Back
            }
            Err(_) => Handed::Back,
        },
        name = stop.wait() => {
            tracing::info!(signal = name, "stopping");
            Handed::Over
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_socket_for_successors_is_beside_the_status_socket() {
        assert_eq!(
            socket_path(Path::new("/run/kersey/status.sock")),
            Path::new("/run/kersey/status.sock.takeover")
        );
    }

    #[tokio::test]
    async fn a_doorbell_replaces_a_dead_one_and_takes_its_file_along() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("status.sock.takeover");
        drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
        let bell = Doorbell::bind(&path).unwrap();
        assert_eq!(
            std::fs::metadata(&path).unwrap().permissions().mode() & 0o777,
            0o600
        );
        let asking = tokio::task::spawn_blocking({
            let path = path.clone();
            move || handover::ask(&path)
        });
        let Ring::Take(stream, 1) = bell.rung().await else {
            panic!("another wish");
        };
        drop(stream);
        assert!(asking.await.unwrap().is_err(), "it was given nothing");
        drop(bell);
        assert!(!path.exists());
    }
}
