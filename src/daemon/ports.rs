//! The UDP ports that networks of this process share.
//!
//! There is something to share only where one process joins several networks: the supervisor says so before it starts the first.

use std::sync::OnceLock;

use crate::host::shared_port::SharedPorts;

static PORTS: OnceLock<SharedPorts> = OnceLock::new();

/// From here on networks may share ports.
pub(super) fn share() {
    PORTS.get_or_init(SharedPorts::default);
}

/// The shared ports, if this process has several networks.
pub(super) fn shared() -> Option<&'static SharedPorts> {
    PORTS.get()
}
