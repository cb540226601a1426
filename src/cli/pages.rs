//! `kersey man` and `kersey completions`: what packages install beside the program, made from the flags themselves.
//!
//! Manual pages are one for the program and one a subcommand, as `kersey-run(8)`; `flanneld(8)` is `kersey-run` under its
//! other name, and `kersey.toml(5)` has its flags as keys. They are rendered from the same clap commands as the help, so that
//! they cannot say anything else.

use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::{Args, Command};
use clap_complete::Shell;
use clap_mangen::Man;
use clap_mangen::roff::{Roff, bold, italic, roman};

use super::flags::{Entry, subcommand};
use super::help::whole;
use super::run::RunArgs;
use super::{SUBCOMMANDS, Stop, UsageError, config_file, exit};

/// System administration commands.
const COMMANDS: &str = "8";
/// File formats.
const FORMATS: &str = "5";

/// What a daemon reads and writes unless told otherwise.
const FILES: [(&str, &str); 5] = [
    (config_file::DEFAULT_PATH, "flags' names as keys: kersey.toml(5)"),
    ("/run/flannel/subnet.env", "the node's subnet, for Docker and CNI"),
    ("/run/kersey/status.sock", "what kersey-status(8) asks"),
    ("/var/lib/kersey", "the embedded store, and the last known leases"),
    ("/dev/net/tun", "the one thing that is needed of the kernel"),
];

/// Write manual pages, in roff
///
/// `kersey man` prints kersey(8), `kersey man run` kersey-run(8); try `kersey man run | man -l -`. With --dir all pages are
/// written, for a package: into man8 and man5 below it.
#[derive(Debug, Args)]
pub struct ManOptions {
    /// Which page: a subcommand's name, or flanneld [default: the program's]
    page: Option<String>,
    /// Write all pages below this folder, as man8/kersey.8; folders are made if they are not there
    #[arg(long, value_name = "DIR", conflicts_with = "page")]
    dir: Option<PathBuf>,
}

/// Write completions for a shell
///
/// bash: kersey completions bash > /etc/bash_completion.d/kersey
#[derive(Debug, Args)]
pub struct CompletionsOptions {
    /// The shell
    #[arg(value_name = "SHELL", value_parser = shell)]
    shell: Shell,
}

/// Prints a page, or writes all.
///
/// # Errors
/// There is no such page, or it cannot be written.
pub fn man(options: &ManOptions) -> Result<ExitCode> {
    let pages = pages()?;
    if let Some(dir) = &options.dir {
        write_all(&pages, dir)?;
        return Ok(ExitCode::from(exit::OK));
    }
    let wanted = match options.page.as_deref() {
        None => "kersey".to_owned(),
        Some(page) if page.starts_with("kersey") || page == "flanneld" => {
            page.trim_end_matches(".8").trim_end_matches(".5").to_owned()
        }
        Some(page) => format!("kersey-{}", page.replace(' ', "-")),
    };
    let Some(page) = pages.iter().find(|page| page.name == wanted) else {
        let names: Vec<&str> = pages.iter().map(|page| page.name.as_str()).collect();
        let error = UsageError::new(
            format!("there is no page {wanted}"),
            format!("there are {}", names.join(", ")),
        );
        return Ok(Stop::Misused(error).report());
    };
    io::stdout().write_all(&page.text)?;
    Ok(ExitCode::from(exit::OK))
}

/// Prints the completions of a shell.
///
/// # Errors
/// They cannot be written.
pub fn completions(options: &CompletionsOptions) -> Result<ExitCode> {
    let mut text = Vec::new();
    clap_complete::generate(options.shell, &mut for_completion(), "kersey", &mut text);
    io::stdout().write_all(&text)?;
    Ok(ExitCode::from(exit::OK))
}

/// The program as completions should know it: what the help shows, and no more.
fn for_completion() -> Command {
    SUBCOMMANDS.into_iter().fold(whole(), |command, name| {
        command.mut_subcommand(name, |sub| {
            let about = sub.get_about().cloned().unwrap_or_default();
            Command::new(name)
                .about(about)
                .args(sub.get_arguments().filter(|arg| !arg.is_hide_set()))
                .disable_help_flag(true)
        })
    })
}

/// One manual page.
struct Page {
    name: String,
    section: &'static str,
    /// In roff.
    text: Vec<u8>,
}

fn write_all(pages: &[Page], dir: &Path) -> Result<()> {
    for page in pages {
        let dir = dir.join(format!("man{}", page.section));
        fs::create_dir_all(&dir).with_context(|| format!("cannot make {}", dir.display()))?;
        let path = dir.join(format!("{}.{}", page.name, page.section));
        fs::write(&path, &page.text).with_context(|| format!("cannot write {}", path.display()))?;
    }
    Ok(())
}

/// Every page.
fn pages() -> Result<Vec<Page>> {
    let mut pages = Vec::new();
    let mut root = whole().disable_help_subcommand(true);
    root.build();
    collect(&root, "kersey", &mut pages)?;
    let mut flanneld = subcommand::<RunArgs>("flanneld", Entry::Flanneld);
    flanneld.build();
    pages.push(page(flanneld, "flanneld")?);
    pages.push(Page {
        name: "kersey.toml".to_owned(),
        section: FORMATS,
        text: keys_page()?,
    });
    Ok(pages)
}

fn collect(command: &Command, name: &str, pages: &mut Vec<Page>) -> Result<()> {
    pages.push(page(command.clone(), name)?);
    for sub in command.get_subcommands().filter(|sub| !sub.is_hide_set()) {
        collect(sub, &format!("{name}-{}", sub.get_name()), pages)?;
    }
    Ok(())
}

fn page(command: Command, name: &str) -> Result<Page> {
    let mut command = command.display_name(name.to_owned());
    let usage = command.render_usage().to_string();
    let is_daemon = command.get_arguments().any(|arg| arg.get_id() == "config");
    let mut text = Vec::new();
    let has_sub = command.has_subcommands();
    let has_more = command.get_after_help().is_some();
    let man = Man::new(command)
        .title(name.to_ascii_uppercase())
        .section(COMMANDS)
        .source(format!("kersey {}", env!("CARGO_PKG_VERSION")))
        .manual("Kersey Manual");
    man.render_title(&mut text)?;
    man.render_name_section(&mut text)?;
    // The one in the library lists every flag by name, twelve lines of them.
    let usage = usage.trim_start_matches("Usage: ").trim().to_owned();
    roff(&mut text, |roff| {
        roff.control("SH", ["SYNOPSIS"]).text([roman(usage)])
    })?;
    man.render_description_section(&mut text)?;
    man.render_options_section(&mut text)?;
    if has_sub {
        man.render_subcommands_section(&mut text)?;
    }
    if has_more {
        let mut extra = Vec::new();
        man.render_extra_section(&mut extra)?;
        text.extend(
            String::from_utf8_lossy(&extra)
                .replacen("EXTRA", "NOTES", 1)
                .into_bytes(),
        );
    }
    if is_daemon {
        roff(&mut text, |roff| {
            FILES
                .iter()
                .fold(roff.control("SH", ["FILES"]), |roff, (path, what)| {
                    roff.control("TP", []).text([italic(*path)]).text([roman(*what)])
                })
        })?;
    }
    if name != "kersey" {
        roff(&mut text, |roff| {
            roff.control("SH", ["SEE ALSO"]).text([
                bold("kersey"),
                roman("(8), "),
                bold("kersey.toml"),
                roman("(5)"),
            ])
        })?;
    }
    Ok(Page {
        name: name.to_owned(),
        section: COMMANDS,
        text,
    })
}

/// The page of the config file: what stands in it, and every key.
fn keys_page() -> Result<Vec<u8>> {
    let run = subcommand::<RunArgs>("run", Entry::Kersey);
    let mut text = Vec::new();
    Man::new(
        Command::new("kersey")
            .about("flags of the daemon in a file")
            .display_name("kersey.toml"),
    )
    .title("KERSEY.TOML")
    .section(FORMATS)
    .source(format!("kersey {}", env!("CARGO_PKG_VERSION")))
    .manual("Kersey Manual")
    .render_title(&mut text)?;
    roff(&mut text, |roff| {
        roff.control("SH", ["NAME"]).text([roman(
            "kersey.toml - flags of kersey run, kersey server and flanneld in a file",
        )]);
        roff.control("SH", ["DESCRIPTION"]).text([roman(
            "Every flag's name is a key; one that may be repeated, or takes a list with commas, takes a list. The command \
             line wins over variables KERSEY_X, these over FLANNELD_X, and all of them over the file. A file whose name ends \
             in .json is read as JSON. An unknown key, a key given twice and a bad value keep the daemon from starting. \
             Try a file with kersey config check.",
        )]);
        roff.control("PP", []).text([roman(
            "A file with a password in it should have mode 0600; one that everybody may write is refused.",
        )]);
        roff.control("SH", ["EXAMPLE"])
            .control("nf", [])
            .text([roman(
                "etcd-endpoints = [\"https://10.0.0.1:2379\", \"https://10.0.0.2:2379\"]",
            )])
            .text([roman("etcd-cafile = \"/etc/kersey/ca.pem\"")])
            .text([roman("iface = [\"eth1\"]")])
            .control("fi", []);
        roff.control("SH", ["KEYS"]);
        for arg in run.get_arguments().filter(|arg| !arg.is_hide_set()) {
            let Some(name) = arg
                .get_long()
                .filter(|name| !config_file::NOT_IN_A_FILE.contains(name))
            else {
                continue;
            };
            let help = arg.get_help().map(ToString::to_string).unwrap_or_default();
            let default: Vec<_> = arg
                .get_default_values()
                .iter()
                .map(|value| value.to_string_lossy())
                .collect();
            let default = match default.as_slice() {
                [] => String::new(),
                values => format!(" [default: {}]", values.join(", ")),
            };
            roff.control("TP", [])
                .text([bold(name)])
                .text([roman(format!("{help}{default}"))]);
        }
        roff.control("SH", ["SEE ALSO"]).text([
            bold("kersey-run"),
            roman("(8), "),
            bold("kersey-config-check"),
            roman("(8)"),
        ])
    })?;
    Ok(text)
}

/// Appends what `write` makes.
fn roff(text: &mut Vec<u8>, write: impl FnOnce(&mut Roff) -> &mut Roff) -> io::Result<()> {
    let mut part = Roff::new();
    write(&mut part);
    part.to_writer(text)
}

fn shell(text: &str) -> Result<Shell, String> {
    match text {
        "bash" => Ok(Shell::Bash),
        "zsh" => Ok(Shell::Zsh),
        "fish" => Ok(Shell::Fish),
        _ => Err("expected bash, zsh or fish".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_subcommand_has_a_page_and_every_flag_is_in_it() {
        let pages = pages().unwrap();
        let names: Vec<&str> = pages.iter().map(|page| page.name.as_str()).collect();
        for wanted in [
            "kersey",
            "kersey-run",
            "kersey-server",
            "kersey-status",
            "kersey-cleanup",
            "kersey-config-check",
            "kersey-docker-opts",
            "kersey-man",
            "kersey-completions",
            "flanneld",
            "kersey.toml",
        ] {
            assert!(names.contains(&wanted), "{wanted}: {names:?}");
        }
        let run = subcommand::<RunArgs>("run", Entry::Kersey);
        for name in ["kersey-run", "flanneld", "kersey.toml"] {
            let page = pages.iter().find(|page| page.name == name).unwrap();
            let text = String::from_utf8(page.text.clone()).unwrap();
            for arg in run.get_arguments().filter(|arg| !arg.is_hide_set()) {
                let flag = arg.get_long().unwrap();
                let is_key = !config_file::NOT_IN_A_FILE.contains(&flag);
                let written = flag.replace('-', "\\-");
                assert!(
                    text.contains(&written) || (name == "kersey.toml" && !is_key),
                    "{name} has no {flag}"
                );
            }
        }
    }

    #[test]
    fn pages_are_in_the_folder_of_their_section() {
        let dir = tempfile::tempdir().unwrap();
        write_all(&pages().unwrap(), &dir.path().join("man")).unwrap();
        let written = |page: &str| fs::read_to_string(dir.path().join("man").join(page)).unwrap();
        assert!(written("man8/kersey-run.8").contains(".TH KERSEY-RUN 8"));
        assert!(written("man5/kersey.toml.5").contains(".TH KERSEY.TOML 5"));
        assert!(!dir.path().join("man/man8/kersey.toml.5").exists());
    }

    #[test]
    fn completions_know_flags_and_subcommands() {
        for shell in [Shell::Bash, Shell::Zsh, Shell::Fish] {
            let mut text = Vec::new();
            clap_complete::generate(shell, &mut for_completion(), "kersey", &mut text);
            let text = String::from_utf8(text).unwrap();
            for part in ["docker-opts", "etcd-endpoints", "ingress-check", "dry-run"] {
                assert!(text.contains(part), "{shell}: {part}");
            }
            for hidden in ["logtostderr", "use-multi-cluster-cidr"] {
                assert!(!text.contains(hidden), "{shell}: {hidden}");
            }
        }
    }

    #[test]
    fn other_shells_are_refused_by_name() {
        assert!(shell("powershell").unwrap_err().contains("bash, zsh or fish"));
    }
}
