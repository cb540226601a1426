//! One packet, one decision: each lands in exactly its own counter, and nothing else happens.
