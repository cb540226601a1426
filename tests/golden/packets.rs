//! Reading the captures: classic pcap, little endian, Ethernet.

/// The packets of a capture, from the IP header on.
pub(crate) fn packets(capture: &[u8]) -> Vec<&[u8]> {
    const FILE_HEADER: usize = 24;
    const RECORD_HEADER: usize = 16;
    const ETHERNET: usize = 14;
    assert_eq!(
        capture[..4],
        0xa1b2_c3d4u32.to_le_bytes(),
        "a classic pcap file, little endian"
    );
    let mut rest = &capture[FILE_HEADER..];
    let mut out = Vec::new();
    while let Some((header, after)) = rest.split_first_chunk::<RECORD_HEADER>() {
        let captured = u32::from_le_bytes(header[8..12].try_into().unwrap()) as usize;
        let (frame, after) = after.split_at(captured);
        rest = after;
        out.push(&frame[ETHERNET..]);
    }
    out
}
