//! A node that starts again: with the subnet it had, with another address, without its store.

use std::path::Path;
use std::time::Duration;

use kersey::control::{Control, ControlOptions};
use kersey::lease::LeaseUpdate;
use tokio::time::{Instant, sleep, timeout};

use crate::fake::{Fake, Mood, attrs, lease, subnet};
use crate::{HOUR, Node, OWN, options, start};

/// F10: a restart does not wait for the store to write anything.
#[tokio::test(start_paused = true)]
async fn a_lease_seen_in_the_store_is_taken_at_once_and_renewed_right_after() {
    let dir = tempfile::tempdir().unwrap();
    let fake = Fake::new();
    fake.script().shown = Some(lease(OWN, 1));
    let begun = Instant::now();
    let node = start(&fake, options_of_a_restart(dir.path())).await;
    assert_eq!(begun.elapsed(), Duration::ZERO);
    assert_eq!(fake.asked(), (0, 0));
    assert_eq!(fake.script().looks, [subnet(OWN)]);
    assert!(node.published.health.borrow().connected);
    sleep(Duration::from_millis(1)).await;
    assert_eq!(fake.asked(), (0, 1));
    assert_eq!(node.published.lease.borrow().subnet, subnet(OWN));
    // From here on it is a lease like any other.
    sleep(HOUR * 22).await;
    assert_eq!(fake.script().renewals, 1);
}

/// F2, F15: what was seen may be another's before it is renewed. Then it is given up, as ever.
#[tokio::test(start_paused = true)]
async fn a_lease_that_was_seen_and_is_lost_at_its_renewal_is_given_up_for_another() {
    let dir = tempfile::tempdir().unwrap();
    let fake = Fake::new();
    fake.script().shown = Some(lease(OWN, 1));
    fake.script().mood = Mood::Lost;
    fake.script().next_subnet = "10.0.9.0-24";
    let mut node = start(&fake, options_of_a_restart(dir.path())).await;
    assert_eq!(node.published.lease.borrow_and_update().subnet, subnet(OWN));
    node.published.lease.changed().await.unwrap();
    assert_eq!(node.published.lease.borrow().subnet, subnet("10.0.9.0-24"));
    assert_eq!(fake.asked(), (1, 1));
    assert_eq!(node.published.health.borrow().conflicts, 1);
}

#[tokio::test(start_paused = true)]
async fn where_a_look_shows_nothing_the_lease_is_acquired_as_ever() {
    let dir = tempfile::tempdir().unwrap();
    // Not there; and no life before this one.
    for restart in [true, false] {
        let fake = Fake::new();
        let options = if restart {
            options_of_a_restart(dir.path())
        } else {
            options(None)
        };
        let _node = start(&fake, options).await;
        assert_eq!(fake.script().looks.len(), usize::from(restart));
        sleep(HOUR).await;
        assert_eq!(fake.asked(), (1, 0));
    }
    // A subnet that the network would not hand out any more is not looked for.
    let fake = Fake::new();
    fake.script().config = r#"{"Network":"10.9.0.0/16"}"#;
    fake.script().next_subnet = "10.9.1.0-24";
    let _node = start(&fake, options_of_a_restart(dir.path())).await;
    assert!(fake.script().looks.is_empty());
    assert_eq!(fake.asked(), (1, 0));
}

/// A store that does not answer is not waited for any longer because of the look.
#[tokio::test(start_paused = true)]
async fn a_look_at_a_silent_store_costs_no_patience() {
    let dir = tempfile::tempdir().unwrap();
    let fake = Fake::new();
    let mut options = options_of_a_restart(dir.path());
    options.state_dir = Some(dir.path().to_owned());
    let node = start(&fake, options.clone()).await;
    sleep(Duration::from_secs(10)).await;
    drop(node);
    let mut control = Control::new(fake.clone(), options);
    let config = control.network_config().await;
    fake.script().mood = Mood::Silent;
    let begun = Instant::now();
    assert_eq!(control.acquire(&attrs(1), &config).await.subnet, subnet(OWN));
    assert_eq!(begun.elapsed(), kersey::control::PATIENCE);
}

#[tokio::test(start_paused = true)]
async fn a_node_that_moves_takes_its_lease_along() {
    // F13.
    let fake = Fake::new();
    let mut control = Control::new(fake.clone(), options(None)).moving(Some(lease(OWN, 1)));
    let config = control.network_config().await;
    let taken = control.acquire(&attrs(7), &config).await;
    assert_eq!((taken.subnet, taken.attrs), (subnet(OWN), attrs(7)));
    let ip = |i| std::net::Ipv4Addr::new(192, 0, 2, i);
    assert_eq!(fake.script().readdressed, [(ip(1), ip(7))]);
}

#[tokio::test(start_paused = true)]
async fn a_node_that_moves_while_the_store_is_away_goes_on_and_tells_it_later() {
    // F13 in F1.
    let fake = Fake::new();
    let mut control = Control::new(fake.clone(), options(None)).moving(Some(lease(OWN, 1)));
    let config = control.network_config().await;
    fake.script().mood = Mood::Silent;
    let begun = Instant::now();
    let taken = control.acquire(&attrs(7), &config).await;
    assert!(begun.elapsed() <= Duration::from_secs(1), "{:?}", begun.elapsed());
    assert_eq!((taken.subnet, taken.attrs.clone()), (subnet(OWN), attrs(7)));
    fake.script().mood = Mood::Away;
    let (publish, published) = control.channels(&config, &taken);
    let node = Node {
        published,
        maintain: tokio::spawn(control.maintain(publish)),
    };
    sleep(Duration::from_secs(30)).await;
    assert_eq!(fake.script().readdressed, []);
    fake.script().mood = Mood::Fine;
    sleep(Duration::from_secs(4)).await;
    let ip = |i| std::net::Ipv4Addr::new(192, 0, 2, i);
    assert_eq!(fake.script().readdressed, [(ip(1), ip(7))]);
    // From then on it is a lease like any other.
    let renewals = fake.script().renewals;
    sleep(HOUR * 24).await;
    assert_eq!(fake.script().readdressed.len(), 1);
    assert_eq!(fake.script().renewals, renewals + 1);
    assert_eq!(node.published.lease.borrow().subnet, subnet(OWN));
}

#[tokio::test(start_paused = true)]
async fn a_silent_store_is_waited_for_or_the_cache_is_used() {
    let dir = tempfile::tempdir().unwrap();
    let fake = Fake::new();
    fake.script().mood = Mood::Away;
    let mut control = Control::new(fake.clone(), options(Some(dir.path())));
    // Without a cache there is nothing to start with.
    assert!(timeout(HOUR, control.network_config()).await.is_err());
    fake.script().mood = Mood::Fine;
    let node = start(&fake, options(Some(dir.path()))).await;
    fake.tell(LeaseUpdate::Snapshot(vec![
        lease(OWN, 1),
        lease("10.0.2.0-24", 2),
    ]));
    let written = async {
        while !std::fs::read_to_string(dir.path().join("control.json"))
            .is_ok_and(|text| text.contains("10.0.2.0"))
        {
            sleep(Duration::from_millis(100)).await;
        }
    };
    timeout(HOUR, written).await.unwrap();
    drop(node);
    fake.end_watch();
    for mood in [Mood::Away, Mood::Silent] {
        fake.script().mood = mood;
        let started = Instant::now();
        let node = start(&fake, options(Some(dir.path()))).await;
        assert!(
            started.elapsed() < Duration::from_secs(5),
            "{mood:?}: {:?}",
            started.elapsed()
        );
        assert_eq!(node.published.lease.borrow().subnet, subnet(OWN));
        assert_eq!(node.published.peers.borrow().len(), 1);
        assert!(!node.published.peers.borrow().is_confirmed());
        assert!(!node.published.health.borrow().connected);
        let renewals = fake.script().renewals;
        sleep(Duration::from_secs(1)).await;
        assert!(
            fake.script().renewals > renewals,
            "{mood:?}: the cached lease is not confirmed"
        );
    }
    // A refusal is an answer: a config that was taken away is not taken from the cache.
    fake.script().mood = Mood::Refusing;
    let mut control = Control::new(fake.clone(), options(Some(dir.path())));
    assert!(timeout(HOUR, control.network_config()).await.is_err());
    // Nor is the lease of a node that has another address now.
    fake.script().mood = Mood::Away;
    let mut control = Control::new(fake.clone(), options(Some(dir.path())));
    let config = control.network_config().await;
    assert!(timeout(HOUR, control.acquire(&attrs(7), &config)).await.is_err());
}

/// A node that starts again where `subnet.env` names the subnet it had.
fn options_of_a_restart(dir: &Path) -> ControlOptions {
    let subnet_file = dir.join("subnet.env");
    std::fs::write(
        &subnet_file,
        "FLANNEL_NETWORK=10.0.0.0/16\nFLANNEL_SUBNET=10.0.1.1/24\n",
    )
    .unwrap();
    ControlOptions {
        subnet_file,
        ..options(None)
    }
}
