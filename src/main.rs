//! kersey's command line.

fn main() {}
