use std::collections::VecDeque;
use std::sync::{Arc, Mutex};

use tokio::time::timeout;

use super::*;
use crate::control::store::{Cursor, NetworkItem, Store};

const PACE: Pace = Pace {
    backoff_cap: Duration::from_secs(5),
    relist: RELIST,
};

/// Networks whose watches each tell what was prepared, then are quiet or break.
#[derive(Default)]
struct Script {
    watches: Mutex<VecDeque<Vec<NetworkUpdate>>>,
    breaks: bool,
    opened: Mutex<u32>,
}

impl Networks for Script {
    fn place(&self) -> String {
        "script".to_owned()
    }

    fn open(&self, _name: Option<&NetworkName>) -> Result<Arc<dyn Store>, StoreError> {
        unreachable!("nobody opens one here")
    }

    fn watch(&self, _since: Option<Cursor>) -> BoxStream<'_, Result<NetworkItem, StoreError>> {
        *self.opened.lock().unwrap() += 1;
        let mut watches = self.watches.lock().unwrap();
        let told = match watches.len() {
            1 => watches[0].clone(),
            _ => watches.pop_front().unwrap(),
        };
        let told = stream::iter(told).map(|update| {
            Ok(NetworkItem {
                update,
                cursor: Cursor("1".to_owned()),
            })
        });
        match self.breaks {
            true => told.boxed(),
            false => told.chain(stream::pending()).boxed(),
        }
    }
}

fn script<const N: usize>(watches: [Vec<NetworkUpdate>; N], breaks: bool) -> Script {
    Script {
        watches: Mutex::new(watches.into()),
        breaks,
        opened: Mutex::default(),
    }
}

fn list(names: &[&str]) -> NetworkUpdate {
    NetworkUpdate::Snapshot(names.iter().map(|text| name(text)).collect())
}

fn name(text: &str) -> NetworkName {
    text.parse().unwrap()
}

/// What is heard in a time, without errors.
async fn heard(
    updates: &mut BoxStream<'_, Result<NetworkUpdate, StoreError>>,
    within: Duration,
) -> Vec<NetworkUpdate> {
    let end = Instant::now() + within;
    let mut heard = Vec::new();
    while let Ok(Some(told)) = tokio::time::timeout_at(end, updates.next()).await {
        heard.extend(told);
    }
    heard
}

/// F7: a wiped store must not take all networks of a host down at once.
#[tokio::test(start_paused = true)]
async fn networks_that_a_list_lacks_stay_for_a_while() {
    let networks = script([vec![list(&["a", "b"])], vec![list(&[])]], false);
    let mut updates = super::networks(&networks, BTreeSet::new(), PACE);
    assert_eq!(updates.next().await.unwrap().unwrap(), list(&["a", "b"]));
    // The list of five minutes later has none.
    assert_eq!(updates.next().await.unwrap().unwrap(), list(&["a", "b"]));
    let listed = Instant::now();
    assert!(
        heard(&mut updates, LINGER - Duration::from_secs(1))
            .await
            .is_empty()
    );
    let gone = ["a", "b"].map(|text| NetworkEvent::Removed(name(text)));
    assert_eq!(
        updates.next().await.unwrap().unwrap(),
        NetworkUpdate::Events(gone.into())
    );
    assert_eq!(listed.elapsed().as_secs(), LINGER.as_secs());
    // And they are not told of again.
    assert!(heard(&mut updates, LINGER * 2).await.is_empty());
}

#[tokio::test(start_paused = true)]
async fn a_network_that_comes_back_was_never_gone_and_a_removal_that_is_seen_is_one() {
    let removed = NetworkUpdate::Events(vec![NetworkEvent::Removed(name("b"))]);
    let back = NetworkUpdate::Events(vec![NetworkEvent::Added(name("a"))]);
    let networks = script([vec![list(&[]), removed.clone(), back.clone()]], false);
    let known = ["a", "b"].map(name).into();
    let mut updates = super::networks(&networks, known, PACE);
    let told = heard(&mut updates, Duration::from_secs(200)).await;
    assert_eq!(told, [list(&["a", "b"]), removed, back]);
}

/// A watch may lose events without a sign.
#[tokio::test(start_paused = true)]
async fn all_is_listed_anew_while_a_watch_looks_healthy() {
    let networks = script([vec![list(&["a"])], vec![list(&["a", "new"])]], false);
    let mut updates = super::networks(&networks, BTreeSet::new(), PACE);
    updates.next().await.unwrap().unwrap();
    let second = timeout(RELIST * 2, updates.next()).await;
    assert_eq!(second.unwrap().unwrap().unwrap(), list(&["a", "new"]));
}

/// One that gives a list and breaks, again and again.
#[tokio::test(start_paused = true)]
async fn a_watch_that_breaks_at_once_makes_no_loop_of_lists() {
    let networks = script([vec![list(&["a"])]], true);
    let mut updates = super::networks(&networks, BTreeSet::new(), PACE);
    heard(&mut updates, Duration::from_secs(60)).await;
    let opened = *networks.opened.lock().unwrap();
    // Six while the pauses grow, then one each 2.5 to 5 s.
    assert!((12..=32).contains(&opened), "{opened} lists in a minute");
}
