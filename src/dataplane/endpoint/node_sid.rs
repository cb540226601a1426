//! SIDs as operators write them.

use std::net::IpAddr;
use std::str::FromStr;

use super::{Behavior, LocalSid, SidError};
use crate::addr::{AddrError, Ipv6Prefix};
use crate::wire::srv6::{CsidError, CsidFormat};

/// A SID of one node, as its operator writes it: `SID[/LEN]=BEHAVIOR[,NEXT-HOP][,psp][,usp][,usd]`.
///
/// For uN and uA, LEN is where the argument begins, and `block=BITS` says how much of that is the block, 32 if it is not given.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NodeSid {
    /// Its address; shorter than an address for uN and uA.
    pub prefix: Ipv6Prefix,
    /// What it does.
    pub sid: LocalSid,
}

/// Why a text is no SID.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NodeSidError {
    /// It has another form.
    #[error("a SID is written SID[/LEN]=BEHAVIOR[,NEXT-HOP][,psp][,usp][,usd][,block=BITS]")]
    Form,
    /// The SID is no address.
    #[error(transparent)]
    Addr(#[from] AddrError),
    /// The lengths are none of a compressed SID.
    #[error(transparent)]
    Csid(#[from] CsidError),
    /// The behaviour does not allow it.
    #[error(transparent)]
    Sid(#[from] SidError),
}

impl FromStr for NodeSid {
    type Err = NodeSidError;

    fn from_str(text: &str) -> Result<Self, NodeSidError> {
        let (sid, rest) = text.split_once('=').ok_or(NodeSidError::Form)?;
        let prefix: Ipv6Prefix = if sid.contains('/') {
            sid.parse()?
        } else {
            format!("{sid}/128").parse()?
        };
        let mut words = rest.split(',').map(str::trim);
        let behavior: Behavior = words.next().ok_or(NodeSidError::Form)?.parse()?;
        let (mut next_hop, mut block_len, mut flavors) = (None, 32, Vec::new());
        for word in words {
            if let Some(bits) = word.strip_prefix("block=") {
                block_len = bits.parse().map_err(|_| NodeSidError::Form)?;
            } else if let Ok(addr) = word.parse::<IpAddr>() {
                next_hop = Some(addr);
            } else {
                flavors.push(word);
            }
        }
        let format = match behavior {
            Behavior::Un | Behavior::Ua => {
                CsidFormat::new(block_len, prefix.len().saturating_sub(block_len))?
            }
            Behavior::End
            | Behavior::EndX
            | Behavior::EndDt4
            | Behavior::EndDt6
            | Behavior::EndDt46
            | Behavior::EndDx4
            | Behavior::EndDx6 => CsidFormat::F3216,
        };
        let sid = LocalSid::new(behavior, flavors.join(",").parse()?, next_hop, format)?;
        Ok(Self { prefix, sid })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_form_is_read() {
        for text in [
            "fd00::40=End",
            "fd00::41=End,psp,usd",
            "fd00::42=End.X,2001:db8::3",
            "fd00::43=End.DX4,192.0.2.3",
            "fd00::44=End.DT6",
            "fcbb:bb00:1::/48=uN",
            "fcbb:bb00:1:e001::/64=uA,2001:db8::3,block=48",
        ] {
            assert!(
                text.parse::<NodeSid>().is_ok(),
                "{text}: {:?}",
                text.parse::<NodeSid>()
            );
        }
    }

    #[test]
    fn what_is_wrong_is_named() {
        for (text, named) in [
            ("fd00::40", "is written"),
            ("here=End", "here"),
            ("fd00::40=End.DT9", "End.DT9"),
            ("fd00::40=End.X", "End.X with next hop none"),
            ("fd00::40=End.DT4,psp", "has no flavours"),
            ("fd00::40=End,sideways", "sideways"),
            ("fcbb:bb00:1::/48=uN,block=44", "44"),
        ] {
            let error = text.parse::<NodeSid>().unwrap_err().to_string();
            assert!(error.contains(named), "{text}: {error}");
        }
    }
}
