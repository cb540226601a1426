//! Arguments and variables in, options or a refusal out.

use std::path::Path;
use std::time::Duration;

use super::*;
use crate::addr::NetworkName;
use crate::options::{
    CleanupMode, Enabled, FirewallTool, IngressCheck, LogLevel, Masquerade, StatusForm, StoreKind,
};

#[test]
fn flanneld_without_flags_is_flannels_defaults() {
    let options = run_options(&["flanneld"], &[]);
    let StoreKind::Etcd(etcd) = &options.store.kind else {
        panic!("{:?}", options.store);
    };
    assert_eq!(etcd.endpoints, ["http://127.0.0.1:4001", "http://127.0.0.1:2379"]);
    assert_eq!(etcd.prefix, "/coreos.com/network");
    assert_eq!(options.subnet_file, Path::new("/run/flannel/subnet.env"));
    assert_eq!(options.lease.ttl, Duration::from_secs(86_400));
    assert_eq!(options.lease.renew_margin, Duration::from_secs(3600));
    assert_eq!(options.packet_path.device, "flannel0");
    assert_eq!(options.packet_path.ingress_check, IngressCheck::Strict);
    assert_eq!(options.status_socket, Path::new("/run/kersey/status.sock"));
    assert_eq!(options.log.level, LogLevel::Info);
}

#[test]
fn a_leases_life_and_margin_can_be_set_and_seconds_win_over_minutes() {
    let lease = |flags: &[&str]| {
        let lease = run_options(&[&["flanneld"][..], flags].concat(), &[]).lease;
        (lease.ttl.as_secs(), lease.renew_margin.as_secs())
    };
    assert_eq!(lease(&["--subnet-lease-renew-margin=5"]), (86_400, 300));
    assert_eq!(lease(&["--lease-ttl=60", "--lease-renew-margin=20"]), (60, 20));
    for flags in [
        ["--subnet-lease-renew-margin=5", "--lease-renew-margin=90"],
        ["--lease-renew-margin=90", "--subnet-lease-renew-margin=5"],
    ] {
        assert_eq!(lease(&flags), (86_400, 90), "{flags:?}");
    }
}

#[test]
fn single_flags_take_the_last_value_and_iface_accumulates() {
    let options = run_options(
        &[
            "/opt/bin/flanneld",
            "-iface",
            "eth0",
            "--iface=eth1",
            "-etcd-prefix=/a",
            "-etcd-prefix",
            "/b",
            "-v=0x2",
        ],
        &[],
    );
    assert_eq!(options.interface.iface, ["eth0", "eth1"]);
    let StoreKind::Etcd(etcd) = options.store.kind else {
        panic!("etcd expected");
    };
    assert_eq!(etcd.prefix, "/b");
    assert_eq!(options.log.level, LogLevel::Debug);
}

#[test]
fn an_empty_value_unsets_where_flannels_default_is_empty() {
    let options = run_options(
        &["kersey", "run", "-public-ip=10.0.0.1", "-public-ip="],
        &[("FLANNELD_PUBLIC_IP", "1.1.1.1")],
    );
    assert_eq!(options.interface.public_ip, None);
}

#[test]
fn the_command_line_wins_over_the_environment() {
    let variables = [
        ("FLANNELD_PUBLIC_IP", "10.0.0.1"),
        ("KERSEY_QUEUES", "3"),
        ("FLANNELD_QUEUES", "5"),
    ];
    let options = run_options(&["kersey", "run", "--public-ip", "10.0.0.2"], &variables);
    assert_eq!(options.interface.public_ip, Some("10.0.0.2".parse().unwrap()));
    assert_eq!(
        options.packet_path.queues.map(std::num::NonZeroUsize::get),
        Some(3)
    );
}

#[test]
fn firewall_flags_are_flannels_with_flannels_defaults() {
    let firewall = |flags: &[&str], variables: &[(&str, &str)]| {
        run_options(&[&["kersey", "run"], flags].concat(), variables).firewall
    };
    let default = firewall(&[], &[]);
    assert_eq!(default.masquerade, Masquerade::Off);
    assert_eq!(default.resync, Duration::from_secs(5));
    assert_eq!(
        (default.forward_rules, default.blackhole, default.tunnel_guard),
        (Enabled::Yes, Enabled::No, Enabled::Yes)
    );
    assert_eq!(default.tool, FirewallTool::Auto);
    let flags = [
        "-ip-masq",
        "-ip-masq-fully-random-disable",
        "-iptables-forward-rules=0",
        "-iptables-resync=1",
        "-ip-blackhole-route",
    ];
    let set = firewall(&flags, &[]);
    assert_eq!(set.masquerade, Masquerade::Plain);
    assert_eq!((set.forward_rules, set.blackhole), (Enabled::No, Enabled::Yes));
    assert_eq!(set.resync, Duration::from_secs(1));
    let set = firewall(&["--firewall", "iptables"], &[("FLANNELD_IP_MASQ", "true")]);
    assert_eq!(
        (set.masquerade, set.tool),
        (Masquerade::Random, FirewallTool::Iptables)
    );
}

#[test]
fn the_store_follows_from_the_flags() {
    for (flags, expected) in [
        (
            &["--remote=a:1,http://b:2"] as &[&str],
            "servers: [a:1, b:2], tls: None",
        ),
        (&["--listen=:8888"], "Embedded"),
        (&["--listen=:8888", "--etcd-endpoints=http://e:2379"], "Etcd"),
        (&[], "Etcd"),
    ] {
        let args = [&["kersey", "run"], flags].concat();
        let kind = format!("{:?}", run_options(&args, &[]).store.kind);
        assert!(kind.contains(expected), "{flags:?}: {kind}");
    }
}

#[test]
fn flanneld_with_listen_is_a_server_over_etcd() {
    let parsed = parse(
        &words(&[
            "flanneld",
            "-listen",
            "0.0.0.0:10253",
            "-etcd-prefix=/kubernetes.io/network",
        ]),
        &variables(&[]),
    )
    .unwrap();
    let Command::Server(options) = parsed.command else {
        panic!("{:?}", parsed.command);
    };
    assert_eq!(options.serve.listen[0].to_string(), "0.0.0.0:10253");
    assert!(matches!(options.store.kind, StoreKind::Etcd(_)));
}

#[test]
fn mistakes_are_refused_with_the_way_out() {
    type Words = &'static [&'static str];
    type Pairs = &'static [(&'static str, &'static str)];
    let cases: &[(Words, Pairs, Words)] = &[
        (
            &["--etcd-endpiont=x"],
            &[],
            &["unknown flag --etcd-endpiont", "--etcd-endpoints"],
        ),
        (
            &["--firewall=pf"],
            &[],
            &["--firewall", "auto, nft, iptables, off"],
        ),
        (
            &["--iptables-resync=0"],
            &[],
            &["--iptables-resync", "1 to 86400"],
        ),
        (
            &[],
            &[("FLANNELD_IP_MASQ", "perhaps")],
            &["FLANNELD_IP_MASQ", "\"perhaps\""],
        ),
        (&["--kube-subnet-mgr"], &[], &["not supported", "--remote"]),
        (&["--healthz-port=70000"], &[], &["--healthz-port", "0 to 65535"]),
        (
            &["--remote=a:1", "--remote-certfile=x"],
            &[],
            &["need each other"],
        ),
        (
            &["--listen=:1", "--remote-cafile=x"],
            &[],
            &["without TLS", "--remote-certfile"],
        ),
        (
            &["--remote=http://a:1", "--remote-cafile=x"],
            &[],
            &["plain HTTP", "https://"],
        ),
        (
            &["--remote=a:1", "--remote-token-file=x"],
            &[],
            &["in the clear", "https://"],
        ),
        (
            &["--networks=a,../b"],
            &[],
            &["\"../b\" is no name of a network", "letters, digits"],
        ),
        (
            &[],
            &[("FLANNELD_NETWORKS", "config")],
            &["\"config\" is no name of a network"],
        ),
        (&["--use-multi-cluster-cidr"], &[], &["not supported"]),
        (&["--queues=0"], &[], &["\"0\" for --queues", "1 to 256"]),
        (
            &[],
            &[("KERSEY_QUEUES", "many")],
            &["\"many\" for KERSEY_QUEUES", "1 to 256"],
        ),
        (
            &[],
            &[("FLANNELD_SUBNET_LEASE_RENEW_MARGIN", "1440")],
            &["FLANNELD_SUBNET_LEASE_RENEW_MARGIN", "1439"],
        ),
        (
            &["--ingress-check=maybe"],
            &[],
            &["--ingress-check", "strict, loose, off"],
        ),
        (&["--device=much/too/long"], &[], &["--device", "interface name"]),
        (
            &["--iface-regex=("],
            &[],
            &["--iface-regex", "regular expression"],
        ),
        (&["--public-ip=fd00::1"], &[], &["--public-ip", "IPv4"]),
        (&["--listen=:1", "--remote=a:1"], &[], &["exclude each other"]),
        (
            &["--remote=a:1", "--etcd-endpoints=x"],
            &[],
            &["exclude each other"],
        ),
        (
            &["--remote=ftp://a:1"],
            &[],
            &["--remote", "ftp:// is not supported"],
        ),
        (
            &["--listen=fd://x"],
            &[],
            &["--listen", "fd://x is no inherited socket"],
        ),
        (&["--listen=unix://x"], &[], &["--listen", "absolute path"]),
        (
            &["--network-config=x"],
            &[],
            &["--network-config is for the embedded store"],
        ),
        (&["--etcd-keyfile=x"], &[], &["need each other"]),
        (&["--etcd-username=x"], &[], &["need each other"]),
        (&["--etcd-prefix="], &[], &["--etcd-prefix"]),
        (
            &["--etcd-endpoints=foo bar"],
            &[],
            &["--etcd-endpoints", "foo bar", "invalid"],
        ),
        (&["--lease-ttl=60"], &[], &["never due", "--lease-renew-margin"]),
        (
            &["--verify-inner", "true"],
            &[],
            &["unexpected word", "--verify-inner=true"],
        ),
    ];
    for (flags, environment, expected) in cases {
        let args = [&["kersey", "run"], *flags].concat();
        let error = match parse(&words(&args), &variables(environment)) {
            Err(Stop::Misused(error)) => error.to_string(),
            other => panic!("{flags:?} {environment:?}: {other:?}"),
        };
        for part in *expected {
            assert!(error.contains(part), "{flags:?} {environment:?}: {error}");
        }
    }
}

#[test]
fn what_has_no_effect_is_noted() {
    for (flags, environment, expected) in [
        (
            &["--log_dir=/x"] as &[&str],
            &[] as &[(&str, &str)],
            Some("standard error only"),
        ),
        (&["--kubeconfig-file=/x"], &[], Some("--kube-subnet-mgr")),
        (
            &[],
            &[("EVENT_QUEUE_DEPTH", "9")],
            Some("EVENT_QUEUE_DEPTH has no effect"),
        ),
        (
            &[],
            &[("FLANNEL_ETCD_KEYFILE", "/x")],
            Some("did you mean FLANNELD_ETCD_KEYFILE?"),
        ),
        (
            &[
                "--logtostderr",
                "--ip-masq=false",
                "--healthz-port=0",
                "--kube-subnet-mgr=F",
                "--networks=",
            ],
            &[],
            None,
        ),
    ] {
        let args = [&["kersey", "run"], flags].concat();
        let notes = parse(&words(&args), &variables(environment)).unwrap().notes;
        match expected {
            Some(part) => assert!(
                notes.len() == 1 && notes[0].contains(part),
                "{flags:?}: {notes:?}"
            ),
            None => assert!(notes.is_empty(), "{flags:?}: {notes:?}"),
        }
    }
}

#[test]
fn a_password_in_the_environment_is_not_shown() {
    let error = flags::bad_value(
        "FLANNELD_ETCD_PASSWORD",
        "hunter2",
        &clap::Error::new(clap::error::ErrorKind::ValueValidation),
    );
    assert!(!error.to_string().contains("hunter2"));
}

#[test]
fn help_and_version_go_where_each_name_sends_them() {
    for (args, expected, part) in [
        (&["flanneld", "-h"] as &[&str], Stream::Err, "Usage: flanneld"),
        (&["flanneld", "--version"], Stream::Err, "kersey 0"),
        (&["kersey", "run", "--help"], Stream::Out, "Packet path:"),
        (&["kersey", "help", "run"], Stream::Out, "Usage: kersey run"),
        (&["kersey", "server", "-help"], Stream::Out, "--listen"),
    ] {
        match parse(&words(args), &variables(&[])) {
            Err(Stop::Told { text, stream }) => {
                assert_eq!(stream, expected, "{args:?}");
                assert!(text.contains(part), "{args:?}: {text}");
            }
            other => panic!("{args:?}: {other:?}"),
        }
    }
}

#[test]
fn several_networks_are_chosen_as_by_flannel() {
    assert_eq!(run_options(&["kersey", "run"], &[]).networks, None);
    assert_eq!(
        run_options(&["kersey", "run", "--networks=", "--watch-networks=false"], &[]).networks,
        None
    );
    let names = |options: &RunOptions| {
        let choice = options.networks.as_ref().unwrap();
        let allowed = choice.allowed.as_ref()?;
        Some(allowed.iter().map(ToString::to_string).collect::<Vec<_>>())
    };
    let options = run_options(&["flanneld", "-networks=blue, green", "-watch-networks"], &[]);
    assert_eq!(names(&options).unwrap(), ["blue", "green"]);
    let choice = options.networks.clone().unwrap();
    let blue: NetworkName = "blue".parse().unwrap();
    assert!(choice.allows(&blue) && !choice.allows(&"red".parse().unwrap()));
    let own = options.of_network(&blue, &choice, "flannel3".to_owned());
    assert_eq!(own.subnet_file, Path::new("/run/flannel/networks/blue.env"));
    assert_eq!(own.data_dir, options.data_dir.join("networks/blue"));
    assert_eq!(own.packet_path.device, "flannel3");
    let options = run_options(
        &["flanneld", "-watch-networks"],
        &[("FLANNELD_SUBNET_DIR", "/run/nets")],
    );
    assert_eq!(names(&options), None);
    let choice = options.networks.unwrap();
    assert!(choice.allows(&blue));
    assert_eq!(choice.subnet_file(&blue), Path::new("/run/nets/blue.env"));
}

#[test]
fn status_finds_the_socket_the_daemon_was_told() {
    let parsed = parse(
        &words(&["kersey", "status", "--json"]),
        &variables(&[("KERSEY_STATUS_SOCKET", "/s")]),
    )
    .unwrap();
    let Command::Status(options) = parsed.command else {
        panic!("{:?}", parsed.command);
    };
    assert_eq!(
        (options.socket.as_path(), options.form),
        (Path::new("/s"), StatusForm::Json)
    );
}

#[test]
fn cleanup_asks_the_socket_the_daemon_was_told_and_removes_unless_told_not_to() {
    for (flags, mode) in [
        (&[] as &[&str], CleanupMode::Remove),
        (&["-dry-run"], CleanupMode::DryRun),
        (&["--dry-run=false"], CleanupMode::Remove),
    ] {
        let args = [&["kersey", "cleanup"], flags].concat();
        let parsed = parse(&words(&args), &variables(&[("KERSEY_STATUS_SOCKET", "/s")])).unwrap();
        let Command::Cleanup(options) = parsed.command else {
            panic!("{:?}", parsed.command);
        };
        assert_eq!((options.socket.as_path(), options.mode), (Path::new("/s"), mode));
        assert_eq!(options.data_dir, Path::new("/var/lib/kersey"));
    }
}

fn run_options(args: &[&str], environment: &[(&str, &str)]) -> RunOptions {
    match parse(&words(args), &variables(environment)) {
        Ok(Parsed {
            command: Command::Run(options),
            ..
        }) => *options,
        other => panic!("{args:?}: {other:?}"),
    }
}

fn words(args: &[&str]) -> Vec<String> {
    args.iter().map(|&word| word.to_owned()).collect()
}

fn variables(pairs: &[(&str, &str)]) -> Variables {
    pairs
        .iter()
        .map(|(name, value)| ((*name).to_owned(), (*value).to_owned()))
        .collect()
}
