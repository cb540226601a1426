//! A store that does as it is told, and the leases it speaks of.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, SystemTime};

use futures_util::future::BoxFuture;
use futures_util::stream::{self, BoxStream, StreamExt};
use kersey::control::identity::Holder;
use kersey::control::store::{Cursor, Store, StoreError, WatchItem};
use kersey::lease::{Expiration, Lease, LeaseAttrs, LeaseUpdate, Subnet};

use crate::{CONFIG, HOUR, OWN};

/// A store that does as it is told.
pub(crate) struct Fake {
    script: Mutex<Script>,
    wake: tokio::sync::Notify,
}

#[derive(Default)]
pub(crate) struct Script {
    pub(crate) mood: Mood,
    pub(crate) config: &'static str,
    pub(crate) next_subnet: &'static str,
    /// What is acquired is a reservation.
    pub(crate) reserved: bool,
    pub(crate) renewals: usize,
    pub(crate) acquisitions: usize,
    /// What a look at the store shows: any lease, whatever it is asked for.
    pub(crate) shown: Option<Lease>,
    pub(crate) looks: Vec<Subnet>,
    /// How far its clock is ahead of ours.
    pub(crate) ahead: Duration,
    pub(crate) watches: usize,
    /// From which address to which.
    pub(crate) readdressed: Vec<(std::net::Ipv4Addr, std::net::Ipv4Addr)>,
    told: VecDeque<Told>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Mood {
    #[default]
    Fine,
    /// Every request fails at once.
    Away,
    /// No request is ever answered.
    Silent,
    /// Every request is refused.
    Refusing,
    /// Renewals find the lease in other hands.
    Lost,
}

enum Told {
    Update(LeaseUpdate, Vec<Subnet>),
    Failure,
    End,
}

impl Fake {
    pub(crate) fn new() -> Arc<Self> {
        Arc::new(Self {
            script: Mutex::new(Script {
                config: CONFIG,
                next_subnet: OWN,
                ..Script::default()
            }),
            wake: tokio::sync::Notify::new(),
        })
    }

    pub(crate) fn script(&self) -> MutexGuard<'_, Script> {
        self.script.lock().unwrap()
    }

    /// How often a lease was acquired and renewed.
    pub(crate) fn asked(&self) -> (usize, usize) {
        let script = self.script();
        (script.acquisitions, script.renewals)
    }

    pub(crate) fn tell(&self, update: LeaseUpdate) {
        self.script().told.push_back(Told::Update(update, Vec::new()));
        self.wake.notify_one();
    }

    /// A list in which some leases cannot be read.
    pub(crate) fn tell_of_rot(&self, leases: Vec<Lease>, rotten: &[&str]) {
        let unreadable = rotten.iter().map(|key| subnet(key)).collect();
        let told = Told::Update(LeaseUpdate::Snapshot(leases), unreadable);
        self.script().told.push_back(told);
        self.wake.notify_one();
    }

    pub(crate) fn fail_watch(&self) {
        self.script().told.push_back(Told::Failure);
        self.wake.notify_one();
    }

    pub(crate) fn end_watch(&self) {
        self.script().told.push_back(Told::End);
        self.wake.notify_one();
    }

    async fn answer<T>(
        &self,
        answer: impl FnOnce(&mut Script) -> Result<T, StoreError>,
    ) -> Result<T, StoreError> {
        let mood = self.script().mood;
        match mood {
            Mood::Fine | Mood::Lost => answer(&mut self.script()),
            Mood::Away => Err(away()),
            Mood::Silent => std::future::pending().await,
            Mood::Refusing => Err(StoreError::Refused {
                doing: "test",
                cause: "no".to_owned(),
            }),
        }
    }
}

impl Store for Fake {
    fn place(&self) -> String {
        "fake".to_owned()
    }

    fn config(&self) -> BoxFuture<'_, Result<String, StoreError>> {
        Box::pin(self.answer(|script| Ok(script.config.to_owned())))
    }

    fn acquire<'a>(
        &'a self,
        attrs: &'a LeaseAttrs,
        _previous: Option<Subnet>,
    ) -> BoxFuture<'a, Result<Lease, StoreError>> {
        self.script().acquisitions += 1;
        Box::pin(self.answer(|script| {
            let mut lease = later(day_lease(script.next_subnet, attrs), script.ahead);
            if script.reserved {
                lease.expiration = Expiration::Never;
            }
            Ok(lease)
        }))
    }

    fn confirm<'a>(
        &'a self,
        _holder: Option<&'a Holder>,
        subnet: Subnet,
        _attrs: &'a LeaseAttrs,
    ) -> BoxFuture<'a, Result<Option<Lease>, StoreError>> {
        self.script().looks.push(subnet);
        Box::pin(self.answer(|script| Ok(script.shown.clone())))
    }

    fn renew<'a>(&'a self, lease: &'a Lease) -> BoxFuture<'a, Result<Lease, StoreError>> {
        self.script().renewals += 1;
        let lost = self.script().mood == Mood::Lost;
        Box::pin(self.answer(move |script| {
            if lost {
                return Err(StoreError::LeaseLost {
                    subnet: lease.subnet,
                    cause: "a stranger has it".to_owned(),
                });
            }
            Ok(later(
                day_lease(&lease.subnet.to_string(), &lease.attrs),
                script.ahead,
            ))
        }))
    }

    fn readdress<'a>(
        &'a self,
        _holder: Option<&'a Holder>,
        lease: &'a Lease,
        formerly: &'a LeaseAttrs,
    ) -> BoxFuture<'a, Result<Lease, StoreError>> {
        Box::pin(self.answer(move |script| {
            script
                .readdressed
                .push((formerly.public_ip, lease.attrs.public_ip));
            Ok(day_lease(&lease.subnet.to_string(), &lease.attrs))
        }))
    }

    fn watch(&self, _since: Option<Cursor>) -> BoxStream<'_, Result<WatchItem, StoreError>> {
        self.script().watches += 1;
        if self.script().mood == Mood::Away {
            return Box::pin(stream::once(async { Err(away()) }));
        }
        let told = stream::unfold((), move |()| async move {
            loop {
                let next = self.script().told.pop_front();
                match next {
                    Some(Told::Update(update, unreadable)) => {
                        let item = WatchItem {
                            update,
                            unreadable,
                            cursor: Cursor("1".to_owned()),
                        };
                        return Some((Ok(item), ()));
                    }
                    Some(Told::Failure) => return Some((Err(away()), ())),
                    Some(Told::End) => return None,
                    None => self.wake.notified().await,
                }
            }
        });
        told.boxed()
    }
}

fn away() -> StoreError {
    StoreError::Unavailable {
        doing: "test",
        place: "fake".to_owned(),
        cause: "away".to_owned(),
    }
}

#[expect(
    clippy::disallowed_methods,
    reason = "a store says in wall-clock time when a lease ends"
)]
fn day_lease(key: &str, attrs: &LeaseAttrs) -> Lease {
    Lease {
        subnet: subnet(key),
        attrs: attrs.clone(),
        expiration: Expiration::At(SystemTime::now() + HOUR * 24),
        created: None,
    }
}

fn later(mut lease: Lease, by: Duration) -> Lease {
    if let Expiration::At(end) = lease.expiration {
        lease.expiration = Expiration::At(end + by);
    }
    lease
}

pub(crate) fn lease(key: &str, i: u8) -> Lease {
    day_lease(key, &attrs(i))
}

pub(crate) fn subnet(key: &str) -> Subnet {
    key.parse().unwrap()
}

pub(crate) fn attrs(i: u8) -> LeaseAttrs {
    LeaseAttrs::from_json(format!("{{\"PublicIP\":\"192.0.2.{i}\"}}").as_bytes()).unwrap()
}
