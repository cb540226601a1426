//! Offloads of a network interface, as `ethtool -K` sets them.

#![expect(
    unsafe_code,
    reason = "SIOCETHTOOL takes a pointer inside a struct; no safe wrapper of it is maintained"
)]

use std::io;
use std::net::UdpSocket;
use std::os::fd::AsRawFd;

/// Whether something is on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Switch {
    /// It is on.
    On,
    /// It is off.
    Off,
}

/// An offload.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Offload {
    /// Checksums are filled in by the device; segmentation needs it too.
    Checksum,
    /// TCP segmentation by the device.
    TcpSegmentation,
    /// Segmentation by the kernel just before the device.
    GenericSegmentation,
    /// Joining of received segments by the kernel just behind the device. A veth takes packets in batches, as that
    /// needs, only while it is on.
    GenericReceive,
}

impl Offload {
    // ETHTOOL_S* of linux/ethtool.h.
    fn command(self) -> u32 {
        match self {
            Self::Checksum => 0x17,
            Self::TcpSegmentation => 0x1f,
            Self::GenericSegmentation => 0x24,
            Self::GenericReceive => 0x2c,
        }
    }
}

/// An offload could not be set.
#[derive(Debug, thiserror::Error)]
#[error("cannot turn {offload:?} {switch:?} on interface {link:?}")]
pub struct EthtoolError {
    link: String,
    offload: Offload,
    switch: Switch,
    #[source]
    source: io::Error,
}

/// Turns `offload` on or off for the interface `link` of the calling thread's namespace.
///
/// # Errors
/// The interface does not exist, or its driver refuses.
pub fn set(link: &str, offload: Offload, switch: Switch) -> Result<(), EthtoolError> {
    let value = EthtoolValue {
        command: offload.command(),
        data: u32::from(switch == Switch::On),
    };
    siocethtool(link, value).map_err(|source| EthtoolError {
        link: link.to_owned(),
        offload,
        switch,
        source,
    })
}

/// `struct ethtool_value` of linux/ethtool.h.
#[repr(C)]
struct EthtoolValue {
    command: u32,
    data: u32,
}

const _: () = assert!(size_of::<EthtoolValue>() == 8);

fn siocethtool(link: &str, mut value: EthtoolValue) -> io::Result<()> {
    let mut name = [0; libc::IFNAMSIZ];
    // The last byte stays zero: the kernel wants the name terminated.
    if link.len() >= name.len() {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    for (to, from) in name.iter_mut().zip(link.bytes()) {
        *to = from.cast_signed();
    }
    let mut request = libc::ifreq {
        ifr_name: name.map(|byte| byte as libc::c_char),
        ifr_ifru: libc::__c_anonymous_ifr_ifru {
            ifru_data: (&raw mut value).cast(),
        },
    };
    let socket = UdpSocket::bind(("127.0.0.1", 0)).or_else(|_| UdpSocket::bind(("::1", 0)))?;
    // SAFETY: `request` is a whole `ifreq` whose data pointer is to `value`, the layout the `ETHTOOL_S*` commands of
    // `Offload` read; both live to the end of this function, and the kernel keeps neither.
    let result = unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCETHTOOL as _, &raw mut request) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}
