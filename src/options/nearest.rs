//! What somebody may have meant who misspelt a name.

/// No name has so many bytes, and comparing takes time by the product of two lengths.
const LONGEST_WORD: usize = 64;

/// The name among `names` most like `word`, if any is close enough to be what was meant: at most a third of its
/// letters are wrong, left out or too many; two that changed places are one.
pub fn nearest<'a>(word: &str, names: impl Iterator<Item = &'a str>) -> Option<&'a str> {
    let plain = |name: &str| name.to_ascii_lowercase().replace('_', "-");
    let word = plain(word);
    if word.len() > LONGEST_WORD {
        return None;
    }
    names
        .map(|name| (strsim::osa_distance(&word, &plain(name)), name))
        .filter(|(distance, name)| *distance <= name.len().max(word.len()) / 3)
        .min()
        .map(|(_, name)| name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_nearest_name_is_close_or_none() {
        let names = ["etcd-endpoints", "etcd-keyfile", "iface"];
        assert_eq!(
            nearest("etcd-endpoint", names.into_iter()),
            Some("etcd-endpoints")
        );
        assert_eq!(nearest("ETCD_KEYFLE", names.into_iter()), Some("etcd-keyfile"));
        assert_eq!(nearest("mtu", names.into_iter()), None);
    }
}
