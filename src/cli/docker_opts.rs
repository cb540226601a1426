//! `kersey docker-opts`: Docker's options from `subnet.env`, as flannel's `mk-docker-opts.sh` writes them, to the byte.
//!
//! ```text
//! subnet.env ─┐
//!             ├─▶ DOCKER_OPT_BIP, _IPMASQ, _MTU, and every other DOCKER_OPT_* there is ─▶ the file, for a unit of Docker's
//! environment ┘
//! ```
//!
//! The script sources the file as shell. Here it is read: `NAME=VALUE` lines, with or without quotes, and nothing in it
//! runs. What the file sets hides a variable of the same name, as in a shell. Three things the script gets wrong are done
//! right: an existing `DOCKER_OPT_*` may have blanks in it, quotes in values are escaped, and the file is replaced whole, so
//! that no reader sees half of it and no link is written through.
//!
//! Started under the name `mk-docker-opts.sh`, the usage goes to standard error with status 1, as there.

use std::collections::BTreeMap;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{Args, FromArgMatches};

use super::{Command, Parsed, Stop, Stream, exit};
use crate::addr::{Ipv4Prefix, Prefix};
use crate::control::{state_file, subnet_file};
use crate::host::netlink::{Gateway, Netlink};

/// Where the script writes.
const DEFAULT_OUTPUT: &str = "/run/docker_opts.env";
/// `subnet.env` has six lines.
const MAX_BYTES: u64 = 64 * 1024;
/// Variables that are options.
const OPTION: &str = "DOCKER_OPT_";

/// Write Docker's options from subnet.env, as flannel's mk-docker-opts.sh
///
/// Writes DOCKER_OPT_BIP, DOCKER_OPT_IPMASQ and DOCKER_OPT_MTU, one a line, and all of them in DOCKER_OPTS, for
/// `EnvironmentFile=` of Docker's unit. Variables called DOCKER_OPT_... that are set already are taken along, and what
/// DOCKER_OPTS holds already comes first.
#[derive(Clone, Debug, PartialEq, Eq, Args)]
#[command(
    after_help = "Exit status: 0 written; 1 not written, or another route to the subnet stands in the way; 2 misused (as mk-docker-opts.sh 1)."
)]
pub struct DockerOptsOptions {
    /// What the daemon wrote
    #[arg(short = 'f', value_name = "FILE", default_value = subnet_file::DEFAULT_PATH)]
    subnet_file: PathBuf,
    /// File to write; `-` is standard output
    #[arg(short = 'd', value_name = "FILE", default_value = DEFAULT_OUTPUT)]
    output: PathBuf,
    /// One variable an option only
    #[arg(short = 'i')]
    individual: bool,
    /// The combined variable only
    #[arg(short = 'c')]
    combined: bool,
    /// Leave out --ip-masq, for a Docker before 1.3
    #[arg(short = 'm')]
    no_ip_masq: bool,
    /// Name of the combined variable
    #[arg(short = 'k', value_name = "NAME", default_value = "DOCKER_OPTS", value_parser = variable_name)]
    key: String,
    /// Under the script's name: without the file there is nothing to say, and that is no error.
    #[arg(skip)]
    is_script: bool,
}

/// Reads the words after the script's name.
pub(super) fn as_script(program: &str, words: &[String]) -> Result<Parsed, Stop> {
    let command = DockerOptsOptions::augment_args(clap::Command::new("docker-opts"))
        .bin_name(program)
        .no_binary_name(true)
        .disable_help_flag(true)
        .args_override_self(true);
    let usage = |why: String| {
        let mut text = if why.is_empty() {
            why
        } else {
            format!("{program}: {why}\n\n")
        };
        let mut shown = command.clone();
        text.push_str(&shown.render_help().to_string());
        Stop::Refused {
            text,
            stream: Stream::Err,
            status: exit::FAILED,
        }
    };
    if words
        .iter()
        .any(|word| ["-h", "-?", "--help"].contains(&word.as_str()))
    {
        return Err(usage(String::new()));
    }
    let matches = command
        .clone()
        .try_get_matches_from(words)
        .map_err(|error| usage(super::flags::first_line(&error)))?;
    let mut options = DockerOptsOptions::from_arg_matches(&matches).map_err(Stop::Clap)?;
    options.is_script = true;
    Ok(Parsed {
        command: Command::DockerOpts(options),
        notes: Vec::new(),
    })
}

/// Writes the file.
#[expect(clippy::print_stderr, reason = "errors are for the person who asked")]
pub fn run(options: &DockerOptsOptions) -> ExitCode {
    let environment = std::env::vars_os()
        .filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)))
        .collect();
    match written(options, environment) {
        Ok(()) => ExitCode::from(exit::OK),
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::from(exit::FAILED)
        }
    }
}

/// Why there are no options, or why they may not work.
#[derive(Debug, thiserror::Error)]
enum DockerOptsError {
    #[error("cannot read {}: {cause}", .path.display())]
    Read { path: PathBuf, cause: io::Error },
    #[error(
        "there is no {}: the daemon writes it when it is ready, and without it Docker would start on a network of its own", .0.display()
    )]
    NoSubnetFile(PathBuf),
    #[error("cannot write {}: {cause}", .path.display())]
    Write { path: PathBuf, cause: io::Error },
    #[error("FLANNEL_IPMASQ is {0:?}: expected true or false")]
    IpMasq(String),
    #[error("{0} has a control character in its value, {1:?}, which no line of the file can have")]
    Control(String, String),
    #[error(
        "there is a route to {subnet} through {gateway} already: the bridge's own would clash with it; remove it, or give the node another subnet"
    )]
    Routed { subnet: Ipv4Prefix, gateway: String },
}

fn written(
    options: &DockerOptsOptions,
    environment: BTreeMap<String, String>,
) -> Result<(), DockerOptsError> {
    let text = match state_file::read(&options.subnet_file, MAX_BYTES) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound && options.is_script => String::new(),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            return Err(DockerOptsError::NoSubnetFile(options.subnet_file.clone()));
        }
        Err(cause) => {
            return Err(DockerOptsError::Read {
                path: options.subnet_file.clone(),
                cause,
            });
        }
    };
    let mut variables = environment;
    variables.extend(assignments(&text));
    let rendered = render(options, &variables)?;
    write(&options.output, &rendered).map_err(|cause| DockerOptsError::Write {
        path: options.output.clone(),
        cause,
    })?;
    match variables
        .get("FLANNEL_SUBNET")
        .and_then(|subnet| subnet.parse().ok())
    {
        Some(subnet) => refuse_other_route(subnet),
        None => Ok(()),
    }
}

/// The text of the file.
fn render(
    options: &DockerOptsOptions,
    variables: &BTreeMap<String, String>,
) -> Result<String, DockerOptsError> {
    let mut swept: BTreeMap<String, String> = variables
        .iter()
        .filter(|(name, _)| name.starts_with(OPTION))
        .map(|(name, value)| (name.clone(), value.clone()))
        .collect();
    let given = |name: &str| variables.get(name).filter(|value| !value.is_empty());
    if let Some(subnet) = given("FLANNEL_SUBNET") {
        swept.insert(format!("{OPTION}BIP"), format!("--bip={subnet}"));
    }
    if let Some(mtu) = given("FLANNEL_MTU") {
        swept.insert(format!("{OPTION}MTU"), format!("--mtu={mtu}"));
    }
    if let Some(masquerades) = given("FLANNEL_IPMASQ").filter(|_| !options.no_ip_masq) {
        // One of the two has to, not both.
        let docker_does = match masquerades.as_str() {
            "true" => false,
            "false" => true,
            other => return Err(DockerOptsError::IpMasq(other.to_owned())),
        };
        swept.insert(format!("{OPTION}IPMASQ"), format!("--ip-masq={docker_does}"));
    }
    let (individual, combined) = match (options.individual, options.combined) {
        (false, false) => (true, true),
        chosen => chosen,
    };
    let mut lines = String::new();
    let mut all = match given(&options.key) {
        Some(before) => format!("{before} "),
        None => String::new(),
    };
    for (name, value) in &swept {
        if individual {
            lines.push_str(&assignment(name, value)?);
        }
        all.push(' ');
        all.push_str(value);
    }
    if combined {
        lines.push_str(&assignment(&options.key, &all)?);
    }
    Ok(lines)
}

/// A line that both systemd and a shell read as `name` having `value`.
fn assignment(name: &str, value: &str) -> Result<String, DockerOptsError> {
    if value.chars().any(char::is_control) {
        return Err(DockerOptsError::Control(name.to_owned(), value.to_owned()));
    }
    let escaped = value.replace('\\', "\\\\").replace('"', "\\\"");
    Ok(format!("{name}=\"{escaped}\"\n"))
}

/// `NAME=VALUE` lines of a file that a shell could source.
fn assignments(text: &str) -> impl Iterator<Item = (String, String)> {
    text.lines().filter_map(|line| {
        let line = line.trim();
        let (name, value) = line.strip_prefix("export ").unwrap_or(line).split_once('=')?;
        let name = variable_name(name.trim()).ok()?;
        let unquoted = ['"', '\'']
            .iter()
            .find_map(|&quote| value.strip_prefix(quote)?.strip_suffix(quote));
        Some((name, unquoted.unwrap_or(value).to_owned()))
    })
}

fn write(path: &Path, text: &str) -> io::Result<()> {
    // What is written to a device is not a file to be replaced.
    if ["-", "/dev/stdout"].map(Path::new).contains(&path) {
        return io::stdout().write_all(text.as_bytes());
    }
    match path.symlink_metadata() {
        Ok(there) if !there.is_file() && !there.is_symlink() => Err(io::Error::other("not a regular file")),
        Ok(_) | Err(_) => state_file::replace(path, text, 0o644, 0o755),
    }
}

/// Docker's bridge brings a route to the subnet; one through a gateway would win or lose by chance.
fn refuse_other_route(subnet: Ipv4Prefix) -> Result<(), DockerOptsError> {
    let Ok(runtime) = tokio::runtime::Builder::new_current_thread().enable_all().build() else {
        return Ok(());
    };
    let found = runtime.block_on(async { Netlink::open().ok()?.routes().await.ok() });
    // Where the kernel does not say, there is nothing to warn of.
    let gateway = found.unwrap_or_default().into_iter().find_map(|held| {
        if held.route.destination != Prefix::V4(subnet) {
            return None;
        }
        match held.route.gateway {
            Gateway::Via(gateway) | Gateway::OnLink(gateway) => Some(gateway.to_string()),
            Gateway::Direct => None,
        }
    });
    match gateway {
        Some(gateway) => Err(DockerOptsError::Routed { subnet, gateway }),
        None => Ok(()),
    }
}

fn variable_name(text: &str) -> Result<String, String> {
    let begins = text.starts_with(|first: char| first.is_ascii_alphabetic() || first == '_');
    if begins && text.chars().all(|c| c.is_ascii_alphanumeric() || c == '_') {
        Ok(text.to_owned())
    } else {
        Err("expected a variable's name: letters, digits and underscores".to_owned())
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    /// What flannel's own tests use.
    const SUBNET_ENV: &str = "FLANNEL_NETWORK=10.1.0.0/16\nFLANNEL_SUBNET=10.1.74.1/24\nFLANNEL_MTU=1472\n\
                              FLANNEL_IPMASQ=false\n";

    #[test]
    fn the_output_is_the_scripts_to_the_byte() {
        let bip = "DOCKER_OPT_BIP=\"--bip=10.1.74.1/24\"\n";
        let masq = "DOCKER_OPT_IPMASQ=\"--ip-masq=true\"\n";
        let mtu = "DOCKER_OPT_MTU=\"--mtu=1472\"\n";
        let all = "DOCKER_OPTS=\" --bip=10.1.74.1/24 --ip-masq=true --mtu=1472\"\n";
        for (words, expected) in [
            (&[] as &[&str], [bip, masq, mtu, all].concat()),
            (&["-i"], [bip, masq, mtu].concat()),
            (&["-c"], all.to_owned()),
            (&["-ic"], [bip, masq, mtu, all].concat()),
            (
                &["-k", "CUSTOM_KEY"],
                [bip, masq, mtu, &all.replace("DOCKER_OPTS", "CUSTOM_KEY")].concat(),
            ),
            (
                &["-c", "-kDOCKER_NETWORK_OPTIONS"],
                all.replace("DOCKER_OPTS", "DOCKER_NETWORK_OPTIONS"),
            ),
            (&["-m"], [bip, mtu, &all.replace(" --ip-masq=true", "")].concat()),
            (&["-c", "-m"], all.replace(" --ip-masq=true", "")),
        ] {
            assert_eq!(rendered(words, SUBNET_ENV, &[]), expected, "{words:?}");
        }
    }

    #[test]
    fn masquerading_is_dockers_task_if_it_is_not_ours() {
        for (ours, dockers) in [("true", "false"), ("false", "true")] {
            let text = format!("FLANNEL_IPMASQ={ours}\n");
            assert_eq!(
                rendered(&["-i"], &text, &[]),
                format!("DOCKER_OPT_IPMASQ=\"--ip-masq={dockers}\"\n")
            );
        }
        let variables = BTreeMap::from([("FLANNEL_IPMASQ".to_owned(), "maybe".to_owned())]);
        let error = render(&options(&[]), &variables).unwrap_err().to_string();
        assert!(
            error.contains("FLANNEL_IPMASQ") && error.contains("maybe"),
            "{error}"
        );
        assert!(render(&options(&["-m"]), &variables).is_ok());
    }

    #[test]
    fn what_the_environment_has_is_taken_along() {
        let environment = [
            ("DOCKER_OPT_DNS", "--dns 1.1.1.1"),
            ("DOCKER_OPT_MTU", "--mtu=1"),
            ("DOCKER_OPTS", "--debug"),
            ("FLANNEL_MTU", "9000"),
            ("PATH", "/bin"),
        ];
        assert_eq!(
            rendered(&[], SUBNET_ENV, &environment),
            "DOCKER_OPT_BIP=\"--bip=10.1.74.1/24\"\n\
             DOCKER_OPT_DNS=\"--dns 1.1.1.1\"\n\
             DOCKER_OPT_IPMASQ=\"--ip-masq=true\"\n\
             DOCKER_OPT_MTU=\"--mtu=1472\"\n\
             DOCKER_OPTS=\"--debug  --bip=10.1.74.1/24 --dns 1.1.1.1 --ip-masq=true --mtu=1472\"\n"
        );
        // Without a file the environment is all there is.
        assert_eq!(
            rendered(&["-c"], "", &[("FLANNEL_MTU", "9000")]),
            "DOCKER_OPTS=\" --mtu=9000\"\n"
        );
        assert_eq!(rendered(&["-c"], "", &[]), "DOCKER_OPTS=\"\"\n");
        assert_eq!(rendered(&["-i"], "", &[]), "");
    }

    #[test]
    fn a_file_is_read_and_never_run() {
        let found: Vec<_> = assignments(
            "# a comment\nexport A=1\nB=\"two words\"\r\nC='x'\n$(touch /tmp/x)=1\nD=$(id)\n  E = 5\nF=\n",
        )
        .collect();
        let expected = [
            ("A", "1"),
            ("B", "two words"),
            ("C", "x"),
            ("D", "$(id)"),
            ("E", " 5"),
            ("F", ""),
        ]
        .map(|(name, value)| (name.to_owned(), value.to_owned()));
        assert_eq!(found, expected);
    }

    #[test]
    fn quotes_are_escaped_and_control_characters_refused() {
        assert_eq!(
            rendered(&["-c"], "", &[("DOCKER_OPT_LOG", r#"--log-opt tag="a\b""#)]),
            "DOCKER_OPTS=\" --log-opt tag=\\\"a\\\\b\\\"\"\n"
        );
        let variables = BTreeMap::from([("DOCKER_OPT_X".to_owned(), "a\nUSER=root".to_owned())]);
        assert!(matches!(
            render(&options(&[]), &variables),
            Err(DockerOptsError::Control(..))
        ));
    }

    #[test]
    fn a_hostile_place_is_neither_waited_for_nor_written_through() {
        // B6: FIFO and directory as either file, a link where the output goes.
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
        nix::unistd::mkfifo(Path::new(&at("fifo")), nix::sys::stat::Mode::S_IRWXU).unwrap();
        std::fs::write(at("victim"), "kept").unwrap();
        symlink(at("victim"), at("link")).unwrap();
        std::fs::write(at("subnet.env"), "FLANNEL_MTU=1\n").unwrap();
        for (from, to, fails) in [
            (at("fifo"), at("out"), true),
            (at("."), at("out"), true),
            (at("subnet.env"), at("fifo"), true),
            (at("subnet.env"), at("."), true),
            (at("none"), at("out"), true),
            (at("subnet.env"), at("link"), false),
        ] {
            let result = written(&options(&["-f", &from, "-d", &to]), BTreeMap::new());
            assert_eq!(result.is_err(), fails, "{from} {to}: {result:?}");
        }
        assert_eq!(std::fs::read_to_string(at("victim")).unwrap(), "kept");
        assert!(std::fs::read_to_string(at("link")).unwrap().contains("--mtu=1"));
    }

    /// The script writes no options, and all is well: Docker starts on a network of its own, and nobody is told.
    #[test]
    fn without_subnet_env_only_the_scripts_name_writes_a_file() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
        let words = ["-f", &at("none"), "-d", &at("out")];
        let error = written(&options(&words), BTreeMap::new()).unwrap_err();
        let text = error.to_string();
        assert!(
            text.contains(&format!("there is no {}: the daemon writes it", at("none"))),
            "{text}"
        );
        assert!(!Path::new(&at("out")).exists());
        let Ok(parsed) = as_script("mk-docker-opts.sh", &words.map(str::to_owned)) else {
            panic!("refused");
        };
        let Command::DockerOpts(script) = parsed.command else {
            panic!("another command");
        };
        written(&script, BTreeMap::new()).unwrap();
        assert_eq!(std::fs::read_to_string(at("out")).unwrap(), "DOCKER_OPTS=\"\"\n");
    }

    #[test]
    fn the_scripts_name_gives_the_scripts_usage() {
        for words in [&["-h"] as &[&str], &["-?"], &["-x"], &["-f"], &["-k", "a b"]] {
            let words: Vec<String> = words.iter().map(|&word| word.to_owned()).collect();
            let Err(Stop::Refused { text, stream, status }) = as_script("mk-docker-opts.sh", &words) else {
                panic!("{words:?}");
            };
            assert!(text.contains("Usage: mk-docker-opts.sh"), "{text}");
            assert_eq!((stream, status), (Stream::Err, 1));
        }
        let words = ["-d", "/run/flannel/docker", "-c"].map(str::to_owned);
        let Ok(parsed) = as_script("mk-docker-opts.sh", &words) else {
            panic!("refused");
        };
        assert!(matches!(parsed.command, Command::DockerOpts(options) if options.combined));
    }

    fn rendered(words: &[&str], file: &str, environment: &[(&str, &str)]) -> String {
        let mut variables: BTreeMap<String, String> = environment
            .iter()
            .map(|(name, value)| ((*name).to_owned(), (*value).to_owned()))
            .collect();
        variables.extend(assignments(file));
        render(&options(words), &variables).unwrap()
    }

    fn options(words: &[&str]) -> DockerOptsOptions {
        let command = DockerOptsOptions::augment_args(clap::Command::new("x")).no_binary_name(true);
        DockerOptsOptions::from_arg_matches(&command.try_get_matches_from(words).unwrap()).unwrap()
    }
}
