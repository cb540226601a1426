//! Lines for whoever reads the terminal. Should nobody read any more - `| head`, a terminal that was closed -, work goes on: what was
//! started has to be taken down.

use std::fmt::Arguments;
use std::io::{Write, stderr, stdout};

pub(crate) fn out(line: Arguments<'_>) {
    let _ = writeln!(stdout(), "{line}");
}

pub(crate) fn aside(line: Arguments<'_>) {
    let _ = writeln!(stderr(), "{line}");
}

/// As `println!`, and no end if nobody reads.
macro_rules! say {
    ($($part:tt)*) => { $crate::cli::tell::out(format_args!($($part)*)) };
}

/// As `eprintln!`, and no end if nobody reads.
macro_rules! say_aside {
    ($($part:tt)*) => { $crate::cli::tell::aside(format_args!($($part)*)) };
}

pub(crate) use {say, say_aside};
