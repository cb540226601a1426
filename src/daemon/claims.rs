//! What each of several networks takes of the host, so that no two take the same.
//!
//! A host has one routing table, one set of device names and one of UDP ports. So networks on it must have ranges that do not overlap, ports
//! of their own, and a device each. Whoever comes first holds what it claims; who comes later and wants a part of it is refused, in words that
//! name both, and tries again until one of the two configs is changed or one network is gone. Nothing of the first is touched.
//!
//! Claims outlive the process, in `networks.json` in the data directory: after a restart every network has its device again, and a network that
//! was made while another ran cannot take that one's place because it came up first. They end when the network is removed.
//!
//! Flannel's kernel vxlan devices share a port among VNIs. Here a port has one socket that hands out each packet once, so every network needs a
//! `Port` of its own, vxlan's too.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::{Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};

use crate::addr::{NetworkName, Prefix};
use crate::backend::{AnyBackend, Backend};
use crate::control::config::NetworkConfig;
use crate::control::state_file;
use crate::daemon::network::networks;

/// The file in the data directory.
const FILE: &str = "networks.json";
/// A claim is some hundred bytes.
const MAX_BYTES: u64 = 1 << 20;
/// The longest name of a link, IFNAMSIZ without its NUL.
const MAX_LINK_NAME: usize = 15;

/// What a network takes, but for its device.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Wants {
    /// Ranges in the kernel's routing table: the overlay's and, with srv6, the block of its locators.
    pub(super) prefixes: Vec<Prefix>,
    /// The UDP port on the underlay.
    pub(super) port: Option<u16>,
}

impl Wants {
    /// What a network of this config takes.
    pub(super) fn of(backend: &AnyBackend, config: &NetworkConfig) -> Self {
        let (port, blocks) = match backend {
            AnyBackend::Udp(backend) => (backend.carrier().port(), Vec::new()),
            AnyBackend::Vxlan(backend) => (backend.carrier().port(), Vec::new()),
            AnyBackend::Auto(backend) => (Some(backend.port()), Vec::new()),
            AnyBackend::Srv6(backend) => (None, backend.blocks()),
            AnyBackend::HostGw(_) | AnyBackend::Alloc(_) => (None, Vec::new()),
        };
        Self {
            prefixes: networks(config)
                .chain(blocks.into_iter().map(Prefix::V6))
                .collect(),
            port,
        }
    }
}

/// Two networks want the same.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("network \"{late}\" cannot be joined beside network \"{early}\" on this host: {what}")]
pub(super) struct Conflict {
    late: NetworkName,
    early: NetworkName,
    what: String,
}

/// All claims on this host.
#[derive(Debug)]
pub(super) struct Claims {
    file: PathBuf,
    held: Mutex<BTreeMap<NetworkName, Held>>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Held {
    device: String,
    wants: Wants,
}

#[derive(Serialize, Deserialize)]
struct Row {
    device: String,
    #[serde(default)]
    prefixes: Vec<String>,
    #[serde(default)]
    port: Option<u16>,
}

impl Claims {
    /// Reads the claims of earlier lives.
    pub(super) fn load(data_dir: &std::path::Path) -> Self {
        let file = data_dir.join(FILE);
        let read = state_file::read(&file, MAX_BYTES).and_then(|text| {
            serde_json::from_str::<BTreeMap<String, Row>>(&text).map_err(std::io::Error::from)
        });
        let rows = match read {
            Ok(rows) => rows,
            Err(error) => {
                if error.kind() != std::io::ErrorKind::NotFound {
                    tracing::warn!(file = %file.display(), %error, "cannot read which network has which device; starting anew");
                }
                BTreeMap::new()
            }
        };
        let held = rows.into_iter().filter_map(|(name, row)| {
            let prefixes = row.prefixes.iter().filter_map(|text| parse_prefix(text));
            let held = Held {
                wants: Wants {
                    prefixes: prefixes.collect(),
                    port: row.port,
                },
                device: row.device,
            };
            Some((name.parse().ok()?, held))
        });
        Self {
            held: Mutex::new(held.collect()),
            file,
        }
    }

    /// The networks that have claims.
    pub(super) fn names(&self) -> Vec<NetworkName> {
        self.held().keys().cloned().collect()
    }

    /// The devices that networks have from before and keep, where `like` is the name of the first.
    pub(super) fn devices(&self, like: &str) -> BTreeSet<String> {
        let held = self.held();
        let devices = held.values().map(|held| &held.device);
        devices.filter(|device| is_like(device, like)).cloned().collect()
    }

    /// The device of a network: the one it had before, else the first of `flannel0`, `flannel1`, … that neither another network has nor `exists`
    /// on this host, where `like` is the name of the first.
    pub(super) fn device(&self, name: &NetworkName, like: &str, exists: impl Fn(&str) -> bool) -> String {
        let stem = stem(like);
        let first = like
            .get(stem.len()..)
            .and_then(|digits| digits.parse::<u32>().ok());
        let mut held = self.held();
        if let Some(known) = held.get(name)
            && is_like(&known.device, like)
        {
            return known.device.clone();
        }
        let free = (first.unwrap_or(0)..).find_map(|number| {
            let candidate = format!("{}{number}", stem_within(stem, number));
            let taken = exists(&candidate)
                || held
                    .iter()
                    .any(|(other, held)| other != name && held.device == candidate);
            (!taken).then_some(candidate)
        });
        let device = free.unwrap_or_else(|| like.to_owned());
        let wants = held.get(name).map(|held| held.wants.clone()).unwrap_or_default();
        let new = Held {
            device: device.clone(),
            wants,
        };
        held.insert(name.clone(), new);
        self.save(&held);
        device
    }

    /// Takes what a network wants, in place of what it had; gives the ranges that are nobody's any more.
    ///
    /// # Errors
    /// Another network has a part of it.
    pub(super) fn take(&self, name: &NetworkName, wants: &Wants) -> Result<Vec<Prefix>, Conflict> {
        let mut held = self.held();
        for (other, theirs) in held.iter().filter(|(other, _)| *other != name) {
            if let Some(what) = clash(wants, &theirs.wants) {
                return Err(Conflict {
                    late: name.clone(),
                    early: other.clone(),
                    what,
                });
            }
        }
        let Some(own) = held.get_mut(name).filter(|own| own.wants != *wants) else {
            return Ok(Vec::new());
        };
        let mut former = std::mem::replace(&mut own.wants, wants.clone()).prefixes;
        former.retain(|prefix| !wants.prefixes.contains(prefix));
        self.save(&held);
        Ok(former)
    }

    /// Gives up all a network has, and tells which ranges that were.
    pub(super) fn release(&self, name: &NetworkName) -> Vec<Prefix> {
        let mut held = self.held();
        let Some(released) = held.remove(name) else {
            return Vec::new();
        };
        self.save(&held);
        released.wants.prefixes
    }

    fn held(&self) -> MutexGuard<'_, BTreeMap<NetworkName, Held>> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn save(&self, held: &BTreeMap<NetworkName, Held>) {
        let rows: BTreeMap<&str, Row> = held
            .iter()
            .map(|(name, held)| {
                let row = Row {
                    device: held.device.clone(),
                    prefixes: held.wants.prefixes.iter().map(Prefix::to_string).collect(),
                    port: held.wants.port,
                };
                (name.as_str(), row)
            })
            .collect();
        let saved = serde_json::to_string_pretty(&rows)
            .map_err(std::io::Error::from)
            .and_then(|text| state_file::replace(&self.file, &format!("{text}\n"), 0o600, 0o700));
        if let Err(error) = saved {
            tracing::warn!(file = %self.file.display(), %error, "cannot keep which network has which device: a restart may change them");
        }
    }
}

fn parse_prefix(text: &str) -> Option<Prefix> {
    let v4 = text.parse().map(Prefix::V4).ok();
    v4.or_else(|| text.parse().map(Prefix::V6).ok())
}

/// A device's name without its number.
fn stem(device: &str) -> &str {
    device.trim_end_matches(|c: char| c.is_ascii_digit())
}

/// Whether a device has a name as one made after `like` has.
fn is_like(device: &str, like: &str) -> bool {
    stem(device) == stem_within(stem(like), 0)
}

/// As much of a device's stem as leaves room for its number.
fn stem_within(stem: &str, number: u32) -> &str {
    let digits = number.checked_ilog10().unwrap_or(0) as usize + 1;
    let mut end = stem.len().min(MAX_LINK_NAME - digits);
    while !stem.is_char_boundary(end) {
        end -= 1;
    }
    stem.get(..end).unwrap_or(stem)
}

/// What two networks both want, in words.
fn clash(ours: &Wants, theirs: &Wants) -> Option<String> {
    for &our in &ours.prefixes {
        if let Some(their) = theirs
            .prefixes
            .iter()
            .find(|&&their| our.covers(their) || their.covers(our))
        {
            return Some(format!(
                "{our} overlaps that one's {their}, and a host routes an address one way only; give one of them another range"
            ));
        }
    }
    let port = ours.port.filter(|_| ours.port == theirs.port)?;
    Some(format!(
        "both use UDP port {port}, and every network needs its own, whatever its VNI; give one of them another Backend.Port"
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(text: &str) -> NetworkName {
        text.parse().unwrap()
    }

    fn wants(prefixes: &[&str], port: Option<u16>) -> Wants {
        Wants {
            prefixes: prefixes.iter().map(|text| parse_prefix(text).unwrap()).collect(),
            port,
        }
    }

    #[test]
    fn every_network_has_its_device_again_after_a_restart() {
        let dir = tempfile::tempdir().unwrap();
        let nothing = |_: &str| false;
        let claims = Claims::load(dir.path());
        assert_eq!(claims.device(&name("b"), "flannel0", nothing), "flannel0");
        assert_eq!(claims.device(&name("a"), "flannel0", nothing), "flannel1");
        let claims = Claims::load(dir.path());
        assert_eq!(claims.device(&name("a"), "flannel0", nothing), "flannel1");
        assert_eq!(claims.device(&name("b"), "flannel0", nothing), "flannel0");
        claims.release(&name("b"));
        assert_eq!(claims.device(&name("c"), "flannel0", nothing), "flannel0");
        let devices = |like: &str| Vec::from_iter(claims.devices(like));
        assert_eq!(devices("flannel0"), ["flannel0", "flannel1"]);
        // Another --device means other names.
        assert_eq!(devices("over5"), [""; 0]);
        assert_eq!(claims.device(&name("c"), "over5", nothing), "over5");
        assert_eq!(Claims::load(dir.path()).names(), [name("a"), name("c")]);
    }

    #[test]
    fn a_device_is_none_that_somebody_else_has() {
        let dir = tempfile::tempdir().unwrap();
        let claims = Claims::load(dir.path());
        let exists = |link: &str| link == "flannel0" || link == "flannel2";
        assert_eq!(claims.device(&name("a"), "flannel0", exists), "flannel1");
        assert_eq!(claims.device(&name("b"), "flannel0", exists), "flannel3");
        for number in 0..12 {
            let device = claims.device(&name(&format!("n{number}")), "a-rather-long", |_| false);
            assert!(device.len() <= MAX_LINK_NAME, "{device}");
        }
    }

    #[test]
    fn two_networks_that_want_the_same_are_both_named() {
        let dir = tempfile::tempdir().unwrap();
        let claims = Claims::load(dir.path());
        for network in ["blue", "green"] {
            claims.device(&name(network), "flannel0", |_| false);
        }
        let blue = wants(&["10.1.0.0/16", "fd01::/48"], Some(8472));
        assert_eq!(claims.take(&name("blue"), &blue), Ok(Vec::new()));
        assert_eq!(claims.take(&name("blue"), &blue), Ok(Vec::new()));
        for (rival, said) in [
            (
                wants(&["10.0.0.0/8"], None),
                "10.0.0.0/8 overlaps that one's 10.1.0.0/16",
            ),
            (wants(&["10.1.2.0/24"], None), "10.1.2.0/24 overlaps"),
            (wants(&["fd01:0:0:5::/64"], None), "fd01:0:0:5::/64 overlaps"),
            (wants(&["10.2.0.0/16"], Some(8472)), "both use UDP port 8472"),
        ] {
            let error = claims.take(&name("green"), &rival).unwrap_err().to_string();
            assert!(
                error.contains("\"green\"") && error.contains("\"blue\""),
                "{error}"
            );
            assert!(error.contains(said), "{error}");
        }
        let green = wants(&["10.2.0.0/16", "fd02::/48"], Some(8473));
        claims.take(&name("green"), &green).unwrap();
        let former = claims.take(&name("green"), &wants(&["10.3.0.0/16", "fd02::/48"], None));
        assert_eq!(former, Ok(wants(&["10.2.0.0/16"], None).prefixes));
        // After a restart the first is still the first, though the other comes up before it.
        let claims = Claims::load(dir.path());
        claims
            .take(&name("green"), &wants(&["10.1.0.0/24"], None))
            .unwrap_err();
        assert_eq!(claims.release(&name("blue")), blue.prefixes);
        claims
            .take(&name("green"), &wants(&["10.1.0.0/24"], None))
            .unwrap();
    }

    #[test]
    fn a_damaged_file_is_as_none() {
        let dir = tempfile::tempdir().unwrap();
        for text in ["", "{", "[]", r#"{"../x":{"device":"flannel0"}}"#, r#"{"a":{}}"#] {
            std::fs::write(dir.path().join(FILE), text).unwrap();
            assert!(Claims::load(dir.path()).names().is_empty(), "{text}");
        }
    }
}
