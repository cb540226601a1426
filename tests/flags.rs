//! Every flag flannel has or had gets a verdict: it acts, it is noted, or it is refused with a sentence that says what to do.
//!
//! The lists are flannel's: v0.28.9, and what v0.1 to v0.22 had besides. A flag that is neither acted upon nor spoken of is
//! a failure here, and so is one that `docs/flannel-compat.md` does not name.

use std::collections::BTreeMap;
use std::fs;
use std::process::Command as Process;

use kersey::cli::{Parsed, Stop, parse};

/// Flags of v0.28.9 with a value that asks for something other than the default.
const CURRENT: &[(&str, &str)] = &[
    ("etcd-endpoints", "http://10.0.0.1:2379"),
    ("etcd-prefix", "/lab/network"),
    ("etcd-keyfile", "/k"),
    ("etcd-certfile", "/c"),
    ("etcd-cafile", "/ca"),
    ("etcd-username", "node"),
    ("etcd-password", "secret"),
    ("kube-subnet-mgr", "true"),
    ("kube-api-url", "http://127.0.0.1:8080"),
    ("kubeconfig-file", "/kubeconfig"),
    ("kube-annotation-prefix", "example.com"),
    ("net-config-path", "/net-conf.json"),
    ("set-node-network-unavailable", "false"),
    ("iface", "eth1"),
    ("iface-regex", "^eth"),
    ("iface-can-reach", "192.0.2.1"),
    ("public-ip", "192.0.2.1"),
    ("public-ipv6", "2001:db8::1"),
    ("subnet-file", "/subnet.env"),
    ("subnet-lease-renew-margin", "30"),
    ("ip-masq", "true"),
    ("ip-masq-fully-random-disable", "true"),
    ("iptables-forward-rules", "false"),
    ("iptables-resync", "7"),
    ("ip-blackhole-route", "true"),
    ("healthz-ip", "127.0.0.2"),
    ("healthz-port", "8081"),
    ("v", "3"),
    ("vmodule", "a=1"),
    ("log_backtrace_at", "a.go:1"),
];

/// Flags only older versions had.
const FORMER: &[(&str, &str)] = &[
    ("etcd-endpoint", "http://10.0.0.1:2379"),
    ("listen", "0.0.0.0:8888"),
    ("remote", "10.0.0.1:8888"),
    ("remote-keyfile", "/k"),
    ("remote-certfile", "/c"),
    ("remote-cafile", "/ca"),
    ("networks", "blue,red"),
    ("watch-networks", "true"),
    ("subnet-dir", "/run/flannel/other"),
    ("use-multi-cluster-cidr", "true"),
    ("logtostderr", "true"),
    ("alsologtostderr", "true"),
    ("stderrthreshold", "INFO"),
    ("log_dir", "/var/log"),
];

/// What becomes of a flag that is given what it has above.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fate {
    Acts,
    /// It is taken, and a note says why it changes nothing.
    Noted,
    /// What it asks for is so in any case.
    AlreadySo,
    /// With a sentence that says what to do instead.
    Refused,
}

fn fate(flag: &str) -> Fate {
    match flag {
        "kube-subnet-mgr" | "use-multi-cluster-cidr" => Fate::Refused,
        "kube-api-url"
        | "kubeconfig-file"
        | "kube-annotation-prefix"
        | "net-config-path"
        | "set-node-network-unavailable"
        | "vmodule"
        | "log_backtrace_at"
        | "log_dir" => Fate::Noted,
        "logtostderr" | "alsologtostderr" | "stderrthreshold" => Fate::AlreadySo,
        _ => Fate::Acts,
    }
}

/// What the compatibility page says of it: the last cell of the row that has the flag in its first.
fn told_fate(page: &str, flag: &str) -> Fate {
    let wanted = format!("`{flag}`");
    let rows = page.lines().filter(|line| line.starts_with("| `"));
    let mut cells = rows.map(|row| {
        row.trim_matches('|')
            .split('|')
            .map(str::trim)
            .collect::<Vec<_>>()
    });
    let row = cells
        .find(|cells| {
            cells[0]
                .split(", ")
                .any(|name| name.split(' ').next() == Some(wanted.as_str()))
        })
        .unwrap_or_else(|| panic!("docs/flannel-compat.md has no row of {flag}"));
    match row.last().copied().unwrap_or_default() {
        told if told.starts_with("accepted with a note") => Fate::Noted,
        told if told.starts_with("accepted: ") => Fate::AlreadySo,
        told if told.contains("`true` is refused") || told.starts_with("refused") => Fate::Refused,
        _ => Fate::Acts,
    }
}

/// Flags that need another one beside them.
fn partner(flag: &str) -> &'static [&'static str] {
    match flag {
        "etcd-keyfile" => &["--etcd-certfile=/c"],
        "etcd-certfile" => &["--etcd-keyfile=/k"],
        "etcd-username" => &["--etcd-password=p"],
        "etcd-password" => &["--etcd-username=u"],
        "remote-keyfile" => &["--remote-certfile=/c", "--remote=10.0.0.1:8888"],
        "remote-certfile" => &["--remote-keyfile=/k", "--remote=10.0.0.1:8888"],
        "remote-cafile" => &["--remote=10.0.0.1:8888"],
        "subnet-dir" => &["--networks=blue"],
        "healthz-ip" => &["--healthz-port=8081"],
        "ip-masq-fully-random-disable" => &["--ip-masq=true"],
        _ => &[],
    }
}

#[derive(Debug, PartialEq, Eq)]
enum Verdict {
    Acts,
    Noted,
    Refused(String),
    Silent,
}

#[test]
fn every_flag_of_flannels_has_a_verdict() {
    for (flag, value) in CURRENT.iter().chain(FORMER) {
        let written = [
            vec![format!("--{flag}={value}")],
            vec![format!("-{flag}={value}")],
            vec![format!("-{flag}"), (*value).to_owned()],
        ];
        // A boolean takes its value after an equals sign only.
        let forms = if ["true", "false"].contains(value) { 2 } else { 3 };
        let verdicts: Vec<Verdict> = written[..forms]
            .iter()
            .map(|words| verdict(flag, words, &[]))
            .collect();
        assert!(
            verdicts.windows(2).all(|pair| pair[0] == pair[1]),
            "{flag}: {verdicts:?}"
        );
        let found = match &verdicts[0] {
            Verdict::Acts => Fate::Acts,
            Verdict::Noted => Fate::Noted,
            Verdict::Silent => Fate::AlreadySo,
            Verdict::Refused(text) => {
                let (what, hint) = text.split_once("hint: ").expect(text);
                assert!(what.contains(flag), "{flag}: {text}");
                assert!(
                    hint.split(' ').count() > 3,
                    "{flag} is refused without a way out: {text}"
                );
                Fate::Refused
            }
        };
        assert_eq!(found, fate(flag), "{flag}: {verdicts:?}");
    }
}

#[test]
fn a_variable_gets_the_verdict_of_its_flag() {
    for (flag, value) in CURRENT.iter().chain(FORMER) {
        // The old name of etcd-endpoints is older than the variables.
        if *flag == "etcd-endpoint" {
            continue;
        }
        let suffix = flag.to_ascii_uppercase().replace('-', "_");
        let by_flag = verdict(flag, &[format!("--{flag}={value}")], &[]);
        for prefix in ["FLANNELD", "KERSEY"] {
            let variable = format!("{prefix}_{suffix}");
            let by_variable = verdict(flag, &[], &[(&variable, value)]);
            match (&by_flag, &by_variable) {
                (Verdict::Refused(_), Verdict::Refused(text)) => {
                    assert!(text.contains(&variable), "{variable}: {text}");
                }
                (by_flag, by_variable) => assert_eq!(by_flag, by_variable, "{variable}"),
            }
        }
    }
}

#[test]
fn a_misspelt_flag_is_refused_with_its_name() {
    let long = CURRENT.iter().chain(FORMER).filter(|(flag, _)| flag.len() > 4);
    let mistakes = long.flat_map(|(flag, value)| {
        let (start, third, fourth, end) = (&flag[..2], &flag[2..3], &flag[3..4], &flag[4..]);
        [
            format!("{start}{third}x{end}"),
            format!("{start}{fourth}{third}{end}"),
            format!("{start}{third}{end}"),
            format!("{start}{third}{fourth}{fourth}{end}"),
        ]
        .map(|wrong| (flag, value, wrong))
    });
    for (flag, value, wrong) in mistakes.filter(|(flag, _, wrong)| flag != &wrong) {
        let Err(Stop::Misused(error)) = parse(
            &words(&["flanneld", &format!("--{wrong}={value}")]),
            &BTreeMap::new(),
        ) else {
            panic!("--{wrong} is taken");
        };
        let text = error.to_string();
        // The old name leads to the new one.
        let meant = if *flag == "etcd-endpoint" {
            "etcd-endpoints"
        } else {
            *flag
        };
        assert!(
            text.contains(&format!("did you mean --{meant}?")),
            "--{wrong}: {text}"
        );
        let variable = format!("FLANNELD_{}", wrong.to_ascii_uppercase().replace('-', "_"));
        let noted = parse(
            &words(&["flanneld"]),
            &BTreeMap::from([(variable.clone(), (*value).to_owned())]),
        );
        let notes = noted.unwrap().notes;
        assert!(
            notes.iter().any(|note| note.contains(&variable)),
            "{variable}: {notes:?}"
        );
    }
}

#[test]
fn the_compatibility_page_says_of_every_flag_what_becomes_of_it() {
    let page = fs::read_to_string("docs/flannel-compat.md").unwrap();
    for (flag, _) in CURRENT.iter().chain(FORMER) {
        assert_eq!(
            told_fate(&page, flag),
            fate(flag),
            "{flag} in docs/flannel-compat.md"
        );
    }
}

#[test]
fn variables_with_a_typo_are_warned_about() {
    for (variable, meant) in [
        ("FLANNEL_IFACE", "FLANNELD_IFACE"),
        ("FLANNEL_ETCD_KEYFILE", "FLANNELD_ETCD_KEYFILE"),
        ("FLANNELD_IFASE", "FLANNELD_IFACE"),
        ("FLANNELD_ETCD_ENDPOINT", "FLANNELD_ETCD_ENDPOINTS"),
        ("KERSEYD_PUBLIC_IP", "KERSEY_PUBLIC_IP"),
        ("KERSEY_LOG_LEVL", "KERSEY_LOG_LEVEL"),
    ] {
        let variables = BTreeMap::from([(variable.to_owned(), "x".to_owned())]);
        let notes = parse(&words(&["flanneld"]), &variables).unwrap().notes;
        assert!(
            notes.len() == 1
                && notes[0].contains(variable)
                && notes[0].contains(&format!("did you mean {meant}?")),
            "{variable}: {notes:?}"
        );
    }
}

#[test]
fn flag_beats_variable_beats_flannels_variable_beats_file_beats_default() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("kersey.toml");
    fs::write(
        &file,
        "queues = 2\niface = [\"a\", \"b\"]\nstatus-socket = \"/from-file\"\n",
    )
    .unwrap();
    let config = format!("--config={}", file.display());
    let ask = |args: &[&str], variables: &[(&str, &str)]| {
        let variables = variables
            .iter()
            .map(|(name, value)| ((*name).to_owned(), (*value).to_owned()))
            .collect();
        format!("{:?}", parse(&words(args), &variables).unwrap().command)
    };
    let (flannels, own) = (("FLANNELD_QUEUES", "3"), ("KERSEY_QUEUES", "4"));
    for (args, variables, expected) in [
        (
            &["flanneld", &config, "--queues=5"] as &[&str],
            &[flannels, own] as &[_],
            "queues: Some(5)",
        ),
        (&["flanneld", &config], &[flannels, own], "queues: Some(4)"),
        (&["flanneld", &config], &[flannels], "queues: Some(3)"),
        (&["flanneld", &config], &[], "queues: Some(2)"),
        (&["flanneld"], &[], "queues: None"),
        // A list is silenced as a whole; an empty name means no file; a variable can name one.
        (&["flanneld", &config], &[], "iface: [\"a\", \"b\"]"),
        (&["flanneld", &config, "--iface=c"], &[], "iface: [\"c\"]"),
        (
            &["flanneld", &config],
            &[("FLANNELD_IFACE", "d")],
            "iface: [\"d\"]",
        ),
        (
            &["flanneld", "--config="],
            &[("KERSEY_CONFIG", file.to_str().unwrap())],
            "queues: None",
        ),
        (
            &["flanneld"],
            &[("KERSEY_CONFIG", file.to_str().unwrap())],
            "queues: Some(2)",
        ),
        (
            &["flanneld"],
            &[("FLANNELD_CONFIG", file.to_str().unwrap())],
            "queues: Some(2)",
        ),
        // The other subcommands take what they know.
        (&["kersey", "status", &config], &[], "socket: \"/from-file\""),
        (&["kersey", "cleanup", &config], &[], "socket: \"/from-file\""),
        (&["kersey", "server", &config], &[], "Server("),
    ] {
        let command = ask(args, variables);
        assert!(command.contains(expected), "{args:?} {variables:?}: {command}");
    }
}

#[test]
fn what_a_file_asks_for_is_judged_like_a_flag() {
    let dir = tempfile::tempdir().unwrap();
    for (text, parts) in [
        (
            "kube-subnet-mgr = true",
            [
                "kersey.toml line 1: kube-subnet-mgr=true is not supported",
                "hint: ",
            ],
        ),
        (
            "\n\nqueues = 300",
            [
                "invalid value \"300\" for queues in",
                "kersey.toml line 3: expected a whole number from 1 to 256",
            ],
        ),
        (
            "etcd-password = true",
            ["kersey.toml line 1: etcd-password is true", "expected text"],
        ),
        (
            "ifase = 'x'",
            [
                "kersey.toml line 1: unknown key \"ifase\"",
                "did you mean \"iface\"?",
            ],
        ),
    ] {
        let file = dir.path().join("kersey.toml");
        fs::write(&file, text).unwrap();
        let Err(Stop::Misused(error)) = parse(
            &words(&["flanneld", &format!("--config={}", file.display())]),
            &BTreeMap::new(),
        ) else {
            panic!("{text} is taken");
        };
        for part in parts {
            assert!(error.to_string().contains(part), "{text}: {error}");
        }
    }
}

/// As flanneld: what goes where, with which status.
#[test]
fn help_version_and_mistakes_as_a_shell_sees_them() {
    let dir = tempfile::tempdir().unwrap();
    let flanneld = dir.path().join("flanneld");
    std::os::unix::fs::symlink(env!("CARGO_BIN_EXE_kersey"), &flanneld).unwrap();
    let kersey = std::path::PathBuf::from(env!("CARGO_BIN_EXE_kersey"));
    let version = format!("kersey {}\n", env!("CARGO_PKG_VERSION"));
    for (program, args, status, out, err) in [
        (&flanneld, &["--help"] as &[&str], 0, "", "Usage: flanneld"),
        (&flanneld, &["-h"], 0, "", "Usage: flanneld"),
        (&flanneld, &["-help"], 0, "", "Usage: flanneld"),
        (&flanneld, &["-version"], 0, "", version.as_str()),
        (&flanneld, &["--version"], 0, "", version.as_str()),
        (&flanneld, &["--version=true"], 0, "", version.as_str()),
        (&flanneld, &["-version=1", "--iface=x"], 0, "", version.as_str()),
        (&flanneld, &["--ifase=x"], 2, "", "did you mean --iface?"),
        (&flanneld, &["-v=x"], 2, "", "invalid value \"x\" for --v"),
        (&flanneld, &["-v"], 2, "", "--v needs a value"),
        (
            &flanneld,
            &["--config=/nowhere", "--iface=x"],
            2,
            "",
            "cannot use the config file /nowhere",
        ),
        (&kersey, &["--version"], 0, version.as_str(), ""),
        (&kersey, &["-version"], 0, version.as_str(), ""),
        (&kersey, &["version"], 0, version.as_str(), ""),
        (&kersey, &["run", "--version"], 0, "", version.as_str()),
        (&kersey, &["--help"], 0, "Commands:", ""),
        (&kersey, &["run", "--help"], 0, "--etcd-endpoints", ""),
        (&kersey, &["--iface=eth1"], 2, "", "kersey run --iface=eth1"),
        (&kersey, &["runn"], 2, "", "run"),
        (&kersey, &[], 2, "", "Commands:"),
    ] {
        let done = Process::new(program).args(args).env_clear().output().unwrap();
        let (stdout, stderr) = (text(&done.stdout), text(&done.stderr));
        assert_eq!(done.status.code(), Some(status), "{args:?}: {stdout}{stderr}");
        assert!(
            stdout.contains(out) && stderr.contains(err),
            "{args:?}: {stdout}|{stderr}"
        );
        if out.is_empty() {
            assert_eq!(stdout, "", "{args:?}");
        }
        if err.is_empty() {
            assert_eq!(stderr, "", "{args:?}");
        }
    }
}

#[test]
fn verbosity_is_klogs() {
    for (form, level) in [
        (&["-v=0"] as &[&str], "Info"),
        (&["-v", "1"], "Debug"),
        (&["--v=5"], "Debug"),
        (&["-v=10"], "Trace"),
        (&["-v=0x7"], "Trace"),
        (&["-v=9", "--log-level=warn"], "Warn"),
    ] {
        let parsed = parse(&words(&[&["flanneld"], form].concat()), &BTreeMap::new()).unwrap();
        let shown = format!("{:?}", parsed.command);
        assert!(shown.contains(&format!("level: {level}")), "{form:?}: {shown}");
    }
}

fn verdict(flag: &str, given: &[String], variables: &[(&str, &str)]) -> Verdict {
    let mut beside: Vec<String> = partner(flag).iter().map(|&word| word.to_owned()).collect();
    // A partner that is refused for itself says nothing about the flag.
    let alone: Vec<String> = [&["flanneld".to_owned()], &beside[..]].concat();
    if let Err(Stop::Misused(error)) = parse(&alone, &BTreeMap::new())
        && error.to_string().contains("is not supported")
    {
        beside.clear();
    }
    let ask = |given: &[String], variables: &[(&str, &str)]| {
        let words: Vec<String> = [&["flanneld".to_owned()], &beside[..], given].concat();
        let variables = variables
            .iter()
            .map(|(name, value)| ((*name).to_owned(), (*value).to_owned()))
            .collect();
        parse(&words, &variables)
    };
    match ask(given, variables) {
        Ok(Parsed { command, notes }) => {
            // A partner alone may be refused; then its flag makes the difference.
            let without = ask(&[], &[]).map(|parsed| format!("{:?}", parsed.command));
            if notes.iter().any(|note| {
                note.contains(flag) || note.contains(&flag.to_ascii_uppercase().replace('-', "_"))
            }) {
                Verdict::Noted
            } else if without.ok() == Some(format!("{command:?}")) {
                Verdict::Silent
            } else {
                Verdict::Acts
            }
        }
        Err(Stop::Misused(error)) => Verdict::Refused(error.to_string()),
        Err(other) => panic!("{flag}: {other:?}"),
    }
}

fn words(words: &[&str]) -> Vec<String> {
    words.iter().map(|&word| word.to_owned()).collect()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}
