//! `kersey man` and `kersey completions`: what packages install beside the program, made from the flags themselves.
//!
//! Manual pages are one for the program and one a subcommand, as `kersey-run(8)`; `flanneld(8)` is `kersey-run` under its
//! other name. They are rendered from the same clap commands as the help, so that they cannot say anything else.

use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use clap::{Args, Command};
use clap_complete::Shell;
use clap_mangen::Man;

use super::run::RunArgs;
use super::{Entry, exit, subcommand, whole};

/// System administration commands.
const SECTION: &str = "8";

/// Write manual pages, in roff
///
/// `kersey man` prints kersey(8), `kersey man run` kersey-run(8); try `kersey man run | man -l -`. With --dir all pages are
/// written, for a package.
#[derive(Debug, Args)]
pub struct ManOptions {
    /// Which page: a subcommand's name, or flanneld [default: the program's]
    page: Option<String>,
    /// Write all pages into this folder, which is made if it is not there
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
    let pages = pages();
    if let Some(dir) = &options.dir {
        write_all(&pages, dir)?;
        return Ok(ExitCode::from(exit::OK));
    }
    let wanted = match options.page.as_deref() {
        None => "kersey".to_owned(),
        Some(page) if page.starts_with("kersey") || page == "flanneld" => page.to_owned(),
        Some(page) => format!("kersey-{}", page.replace(' ', "-")),
    };
    let Some((_, text)) = pages.iter().find(|(name, _)| *name == wanted) else {
        let names: Vec<&str> = pages.iter().map(|(name, _)| name.as_str()).collect();
        bail!("there is no page {wanted}; there are {}", names.join(", "));
    };
    io::stdout().write_all(text)?;
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

/// The program as completions should know it: with every flag in the form `--name`.
fn for_completion() -> Command {
    let mut command = whole();
    command.build();
    command
}

fn write_all(pages: &[(String, Vec<u8>)], dir: &Path) -> Result<()> {
    fs::create_dir_all(dir).with_context(|| format!("cannot make {}", dir.display()))?;
    for (name, text) in pages {
        let path = dir.join(format!("{name}.{SECTION}"));
        fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))?;
    }
    Ok(())
}

/// Every page by name.
fn pages() -> Vec<(String, Vec<u8>)> {
    let mut pages = Vec::new();
    let mut root = whole();
    root.build();
    collect(&root, "kersey", &mut pages);
    let mut flanneld = subcommand::<RunArgs>("flanneld", Entry::Flanneld);
    flanneld.build();
    pages.push(("flanneld".to_owned(), page(flanneld, "flanneld")));
    pages
}

fn collect(command: &Command, name: &str, pages: &mut Vec<(String, Vec<u8>)>) {
    pages.push((name.to_owned(), page(command.clone(), name)));
    for sub in command.get_subcommands() {
        if sub.get_name() != "help" && !sub.is_hide_set() {
            collect(sub, &format!("{name}-{}", sub.get_name()), pages);
        }
    }
}

fn page(command: Command, name: &str) -> Vec<u8> {
    let command = command.display_name(name.to_owned());
    let mut text = Vec::new();
    Man::new(command)
        .title(name.to_ascii_uppercase())
        .section(SECTION)
        .source(format!("kersey {}", env!("CARGO_PKG_VERSION")))
        .manual("Kersey Manual")
        .render(&mut text)
        // Writing into memory cannot fail.
        .unwrap_or_default();
    text
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
        let pages = pages();
        let names: Vec<&str> = pages.iter().map(|(name, _)| name.as_str()).collect();
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
        ] {
            assert!(names.contains(&wanted), "{wanted}: {names:?}");
        }
        let run = subcommand::<RunArgs>("run", Entry::Kersey);
        for page in ["kersey-run", "flanneld"] {
            let (_, text) = pages.iter().find(|(name, _)| name == page).unwrap();
            let text = String::from_utf8(text.clone()).unwrap();
            for arg in run.get_arguments().filter(|arg| !arg.is_hide_set()) {
                let flag = arg.get_long().unwrap().replace('-', "\\-");
                assert!(text.contains(&flag), "{page} has no {flag}");
            }
        }
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
