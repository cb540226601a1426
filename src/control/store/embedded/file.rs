//! The file of an embedded store: how it is opened, and what stands in it.
//!
//! The network without a name has the tables `texts` and `leases`, those with a name `network-configs` and `network-leases`, which
//! files from before there were any lack; they are made when such a file is opened. So is `hosts`, of all networks. A Kersey from before
//! a table was there leaves it alone.

use std::fs::{File, OpenOptions, TryLockError};
use std::os::unix::fs::{FileExt, OpenOptionsExt, PermissionsExt};
use std::path::Path;
use std::time::Duration;

use redb::{
    Builder, Database, DatabaseError, ReadableDatabase, ReadableTable, StorageError, TableDefinition,
};
use tokio::time::Instant;

use super::clock::Clock;
use super::refused;
use super::state::{Change, Host, Record, State};
use crate::addr::NetworkName;
use crate::control::identity::Holder;
use crate::control::store::StoreError;
use crate::lease::LeaseAttrs;

/// Numbers: `format`, `file`, `revision`.
const NUMBERS: TableDefinition<'_, &str, u64> = TableDefinition::new("numbers");
/// Texts: `config`.
const TEXTS: TableDefinition<'_, &str, &str> = TableDefinition::new("texts");
/// A lease: value, revision, end in milliseconds since 1970 (0: never).
type LeaseRow = (&'static str, u64, u64);
/// Leases by key.
const LEASES: TableDefinition<'_, &str, LeaseRow> = TableDefinition::new("leases");
/// Configs of networks by name.
const NETWORK_CONFIGS: TableDefinition<'_, &str, &str> = TableDefinition::new("network-configs");
/// Leases of networks by name and key.
const NETWORK_LEASES: TableDefinition<'_, (&str, &str), LeaseRow> = TableDefinition::new("network-leases");

/// Who has a public address, by network (empty: the one without a name) and address: number, name and boot of the host.
const HOSTS: TableDefinition<'_, (&str, &str), (&str, &str, &str)> = TableDefinition::new("hosts");

/// How long a host counts as alive after a restart: longer than its node takes to find the server again.
const REVIVED: Duration = Duration::from_secs(90);

/// The layout above; a file with another number is refused.
const FORMAT: u64 = 1;

pub(super) fn damaged(path: &Path, error: &dyn std::fmt::Display) -> StoreError {
    let cause = format!(
        "{} is damaged: {error}; restore it from a backup or move it away",
        path.display()
    );
    refused("open the store", cause)
}

pub(super) fn open_database(path: &Path) -> Result<Database, StoreError> {
    const DOING: &str = "open the store";
    let cannot = |error: &dyn std::fmt::Display| refused(DOING, format!("{}: {error}", path.display()));
    if let Some(parent) = path.parent() {
        std::fs::create_dir_all(parent).map_err(|error| cannot(&error))?;
    }
    let file = open_file(path).map_err(|error| cannot(&error))?;
    match file.try_lock() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => {
            return Err(cannot(&"in use by another process; a store has one server only"));
        }
        Err(TryLockError::Error(error)) => return Err(cannot(&error)),
    }
    distrust(&file).map_err(|error| cannot(&error))?;
    let mut database = match Builder::new().set_cache_size(CACHE_BYTES).create_file(file) {
        Ok(database) => database,
        Err(DatabaseError::DatabaseAlreadyOpen) => {
            return Err(cannot(&"in use by another process; a store has one server only"));
        }
        Err(DatabaseError::Storage(StorageError::Io(error)))
            if error.kind() != std::io::ErrorKind::InvalidData =>
        {
            return Err(cannot(&error));
        }
        Err(error) => return Err(damaged(path, &error)),
    };
    // Checks the sums of all pages; what a crash left half-written goes back to the last complete transaction.
    if !database
        .check_integrity()
        .map_err(|error| damaged(path, &error))?
    {
        tracing::warn!(path = %path.display(), "the store was damaged; the last complete state is used");
    }
    Ok(database)
}

/// Everything is in memory anyway; redb's own cache only serves the writes.
const CACHE_BYTES: usize = 4 << 20;

/// Has redb check everything in the file when it opens it, as after a crash.
///
/// After an orderly end redb takes the file's list of free pages without looking at its checksum, and panics if that
/// is damaged. With the flag "recovery required" set and "two-phase commit" clear (both in byte 9 of redb's file
/// format 3, after the magic number) it checks all pages and makes the list anew, in milliseconds for a file of this
/// size. The caller holds the lock.
fn distrust(file: &File) -> std::io::Result<()> {
    const MAGIC: [u8; 9] = *b"redb\x1a\x0a\xa9\x0d\x0a";
    const RECOVERY_REQUIRED: u8 = 2;
    const TWO_PHASE_COMMIT: u8 = 4;
    let mut start = [0; 10];
    match file.read_exact_at(&mut start, 0) {
        Err(error) if error.kind() == std::io::ErrorKind::UnexpectedEof => return Ok(()),
        read => read?,
    }
    let flags = start[9];
    let wanted = (flags | RECOVERY_REQUIRED) & !TWO_PHASE_COMMIT;
    if start[..9] == MAGIC && flags != wanted {
        file.write_all_at(&[wanted], 9)?;
    }
    Ok(())
}

/// Opens a regular file, and neither follows a link nor waits for a FIFO.
fn open_file(path: &Path) -> std::io::Result<File> {
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK)
        .open(path)?;
    let metadata = file.metadata()?;
    if !metadata.is_file() {
        return Err(std::io::Error::other("not a regular file"));
    }
    // Whoever writes it decides where packets go.
    if metadata.permissions().mode() & 0o002 != 0 {
        return Err(std::io::Error::other("everybody may write it (chmod o-w)"));
    }
    Ok(file)
}

/// Reads everything in the file; what is left of leases' time is counted from `now`.
pub(super) fn load(
    database: &Database,
    clock: Clock,
    now: Instant,
    ttl: Duration,
) -> Result<State, Box<dyn std::error::Error>> {
    let write = database.begin_write()?;
    {
        let mut numbers = write.open_table(NUMBERS)?;
        write.open_table(TEXTS)?;
        write.open_table(LEASES)?;
        write.open_table(NETWORK_CONFIGS)?;
        write.open_table(NETWORK_LEASES)?;
        write.open_table(HOSTS)?;
        if numbers.get("file")?.is_none() {
            numbers.insert("file", rand::random::<u64>().max(1))?;
            numbers.insert("format", FORMAT)?;
        }
    }
    write.commit()?;
    let read = database.begin_read()?;
    let numbers = read.open_table(NUMBERS)?;
    let number = |name| {
        numbers
            .get(name)
            .map(|found| found.map_or(0, |found| found.value()))
    };
    if number("format")? != FORMAT {
        return Err(format!("its format is {}, not {FORMAT}", number("format")?).into());
    }
    let mut state = State::new(number("file")?, number("revision")?);
    let record = |(value, revision, ends): (&str, u64, u64)| {
        LeaseAttrs::from_json(value.as_bytes()).map(|attrs| Record {
            attrs,
            revision,
            ends: (ends != 0).then(|| clock.revive(ends, now, ttl)),
        })
    };
    state.network_mut(None).config = read
        .open_table(TEXTS)?
        .get("config")?
        .map(|text| text.value().to_owned());
    for row in read.open_table(LEASES)?.iter()? {
        let (key, row) = row?;
        let (subnet, record) = (key.value().parse()?, record(row.value())?);
        state.network_mut(None).leases.insert(subnet, record);
    }
    for row in read.open_table(NETWORK_CONFIGS)?.iter()? {
        let (name, text) = row?;
        let name: NetworkName = name.value().parse()?;
        state.network_mut(Some(&name)).config = Some(text.value().to_owned());
    }
    for row in read.open_table(NETWORK_LEASES)?.iter()? {
        let (key, row) = row?;
        let (name, key) = key.value();
        let name: NetworkName = name.parse()?;
        let (subnet, record) = (key.parse()?, record(row.value())?);
        state.network_mut(Some(&name)).leases.insert(subnet, record);
    }
    let ends = Some(now + REVIVED);
    for row in read.open_table(HOSTS)?.iter()? {
        let (key, row) = row?;
        let (name, address) = key.value();
        let name: Option<NetworkName> = match name {
            "" => None,
            name => Some(name.parse()?),
        };
        let (id, host, boot) = row.value();
        let holder = Holder {
            id: id.to_owned(),
            host: host.to_owned(),
            boot: boot.to_owned(),
        };
        let hosts = &mut state.network_mut(name.as_ref()).hosts;
        hosts.insert(address.parse()?, Host { holder, ends });
    }
    Ok(state)
}

/// Writes changes of one network, all or none; `revision` is that before the first.
pub(super) fn persist(
    database: &Database,
    clock: Clock,
    network: Option<&NetworkName>,
    changes: &[Change],
    mut revision: u64,
) -> Result<(), redb::Error> {
    let write = database.begin_write()?;
    {
        let mut texts = write.open_table(TEXTS)?;
        let mut leases = write.open_table(LEASES)?;
        let mut network_configs = write.open_table(NETWORK_CONFIGS)?;
        let mut network_leases = write.open_table(NETWORK_LEASES)?;
        let mut hosts = write.open_table(HOSTS)?;
        for change in changes {
            revision += 1;
            match (change, network.map(NetworkName::as_str)) {
                (Change::Config(Some(text)), None) => {
                    texts.insert("config", text.as_str())?;
                }
                (Change::Config(Some(text)), Some(name)) => {
                    network_configs.insert(name, text.as_str())?;
                }
                (Change::Config(None), None) => {
                    texts.remove("config")?;
                }
                (Change::Config(None), Some(name)) => {
                    network_configs.remove(name)?;
                }
                (Change::Put(subnet, record), network) => {
                    let (key, value) = (subnet.to_string(), record.attrs.to_json());
                    let ends = record.ends.map_or(0, |end| clock.millis(end));
                    let row = (value.as_str(), revision, ends);
                    match network {
                        None => leases.insert(key.as_str(), row)?,
                        Some(name) => network_leases.insert((name, key.as_str()), row)?,
                    };
                }
                (Change::Delete(subnet), network) => {
                    let key = subnet.to_string();
                    match network {
                        None => leases.remove(key.as_str())?,
                        Some(name) => network_leases.remove((name, key.as_str()))?,
                    };
                }
                (Change::Claim(address, Host { holder, .. }), network) => {
                    let (key, value) = (
                        address.to_string(),
                        (holder.id.as_str(), holder.host.as_str(), holder.boot.as_str()),
                    );
                    hosts.insert((network.unwrap_or_default(), key.as_str()), value)?;
                }
                (Change::Unclaim(address), network) => {
                    let key = address.to_string();
                    hosts.remove((network.unwrap_or_default(), key.as_str()))?;
                }
            }
        }
        write.open_table(NUMBERS)?.insert("revision", revision)?;
    }
    write.commit()?;
    Ok(())
}
