//! Buffers that begin with a page.

use std::ops::{Deref, DerefMut};

/// Bytes in a page.
const PAGE: usize = 4096;

/// Zeros that begin with a page, as most programs' large buffers do that map them.
///
/// The allocator's own begin 16 bytes into a page, and some processors (AMD's Zen 3) copy seven times slower where the destination is 1 to
/// 31 bytes ahead of the source, modulo 4096: where the kernel's buffers happen to be then makes two machines of one.
#[derive(Debug)]
pub(in crate::lab) struct Pages {
    space: Vec<u8>,
    begin: usize,
    len: usize,
}

impl Pages {
    /// `len` bytes.
    pub(in crate::lab) fn new(len: usize) -> Self {
        let space = vec![0; len + PAGE];
        let begin = space.as_ptr().addr().next_multiple_of(PAGE) - space.as_ptr().addr();
        Self { space, begin, len }
    }
}

impl Deref for Pages {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.space[self.begin..self.begin + self.len]
    }
}

impl DerefMut for Pages {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.space[self.begin..self.begin + self.len]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_buffer_begins_with_a_page_and_is_as_long_as_asked() {
        for len in [1, 4096, 65_546, 256 << 10] {
            let mut pages = Pages::new(len);
            pages.fill(7);
            assert_eq!((pages.len(), pages.as_ptr().addr() % PAGE), (len, 0));
        }
    }
}
