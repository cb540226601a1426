//! Descriptors this process was started with.

use std::io;
use std::os::fd::OwnedFd;

use super::sys;

/// Gives a descriptor of its own to what descriptor `number` stands for; closed when another program is started.
///
/// # Errors
/// Nothing is open there.
pub fn descriptor(number: u32) -> io::Result<OwnedFd> {
    let number = i32::try_from(number).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
    sys::duplicate(number)
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;
    use std::os::fd::AsRawFd;

    use super::*;

    #[test]
    fn what_is_open_can_be_had_and_what_is_not_cannot() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let number = u32::try_from(listener.as_raw_fd()).unwrap();
        let same = TcpListener::from(descriptor(number).unwrap());
        assert_eq!(same.local_addr().unwrap(), listener.local_addr().unwrap());
        assert!(descriptor(999_999).is_err());
        assert!(descriptor(u32::MAX).is_err());
    }
}
