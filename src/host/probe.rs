//! Features that a kernel may lack: whether to ask for one, and what came of it.

use std::io;

/// How a probed feature is to be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Switch {
    /// If the kernel has it.
    Auto,
    /// Not at all.
    Off,
}

/// What came of asking for a feature.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Probed {
    /// In use.
    On,
    /// Switched off.
    Forced,
    /// The kernel does not have it.
    Missing,
}

impl Probed {
    /// Asks unless switched off.
    pub fn ask(switch: Switch, ask: impl FnOnce() -> io::Result<()>) -> Self {
        match switch {
            Switch::Off => Self::Forced,
            Switch::Auto => match ask() {
                Ok(()) => Self::On,
                Err(_) => Self::Missing,
            },
        }
    }

    /// Whether it is in use.
    pub fn is_on(self) -> bool {
        self == Self::On
    }

    /// In words, for status and the start-up line.
    pub fn describe(self) -> &'static str {
        match self {
            Self::On => "on",
            Self::Forced => "off (forced)",
            Self::Missing => "off (kernel)",
        }
    }
}
