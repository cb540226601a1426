//! From the overlay to the underlay and back.
pub mod coalesce;
pub mod offload;
pub mod packet;
pub mod route;
pub mod stats;
