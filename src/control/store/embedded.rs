//! Leases in a file of our own, for a server that needs no etcd beside it.
//!
//! All of it is kept in memory; the file (redb: transactions, checksums, a lock) is what survives. A change goes to
//! the file first, in one transaction that is synced before anyone hears of it, then to memory, then to the watchers.
//! So reads never wait for the disk and go on while it is full or gone; a failed write changes nothing and is an
//! error. After a failed write the file is opened anew at the next one, and memory follows it if the two disagree.
//!
//! Every change has a revision. The last 10,000 changes are kept in memory for watchers; one that is further behind,
//! or comes with a cursor from another file or from before a restart it missed changes in, gets a snapshot. A cursor
//! is `FILE.REVISION`, where `FILE` is a random number made with the file.
//!
//! Leases end by the monotonic clock while the server runs. The file keeps the wall-clock time of the end; after a
//! restart a lease has what is left of that, but at least an hour and at most a full lease time, so that neither a
//! clock that was set nor a server that was away for long makes all nodes vanish. Whoever looks first takes ended
//! leases out: every watcher wakes for the next one due, and every list begins with it.
//!
//! Limits: one process at a time. The file never shrinks.

use std::collections::{BTreeMap, VecDeque};
use std::fs::{File, OpenOptions, TryLockError};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use futures_util::future::BoxFuture;
use futures_util::stream::{self, BoxStream};
use redb::{
    Builder, Database, DatabaseError, ReadableDatabase, ReadableTable, StorageError, TableDefinition,
};
use tokio::sync::watch;
use tokio::time::Instant;

use crate::control::RateLimit;
use crate::control::config::NetworkConfig;
use crate::control::store::{Cursor, Entry, Lifetime, LocalStore, Registry, StoreError, WatchItem};
use crate::lease::{Expiration, Lease, LeaseAttrs, LeaseEvent, LeaseUpdate, Subnet};

/// How many changes are kept for watchers: an hour of a 1,000-node network in which every node changes thrice.
const LOG: usize = 10_000;

/// The least time a lease has after a restart: enough for its node to come back and renew.
const GRACE: Duration = Duration::from_secs(60 * 60);

/// Numbers: `format`, `file`, `revision`.
const NUMBERS: TableDefinition<'_, &str, u64> = TableDefinition::new("numbers");
/// Texts: `config`.
const TEXTS: TableDefinition<'_, &str, &str> = TableDefinition::new("texts");
/// Leases by key: value, revision, end in milliseconds since 1970 (0: never).
const LEASES: TableDefinition<'_, &str, (&str, u64, u64)> = TableDefinition::new("leases");

/// The layout above; a file with another number is refused.
const FORMAT: u64 = 1;

/// A store in a file.
pub type EmbeddedStore = LocalStore<EmbeddedRegistry>;

impl EmbeddedStore {
    /// Opens the store at `path`, or makes it.
    ///
    /// # Errors
    /// The file is in use, damaged, no store, or cannot be written.
    pub fn open(path: &Path, ttl: Duration) -> Result<Self, StoreError> {
        EmbeddedRegistry::open(path, ttl).map(Self::new)
    }

    /// Sets the network config.
    ///
    /// # Errors
    /// The config is not usable, or the file cannot be written.
    pub async fn set_config(&self, text: &str) -> Result<(), StoreError> {
        self.registry().set_config(text).await
    }
}

/// One network's leases in a file.
#[derive(Debug, Clone)]
pub struct EmbeddedRegistry(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    path: PathBuf,
    ttl: Duration,
    clock: Clock,
    /// Held throughout a write; `None` after one failed. Taken before `state`.
    writer: Mutex<Option<Database>>,
    /// Held for moments.
    state: Mutex<State>,
    /// The revision reached.
    reached: watch::Sender<u64>,
    complaints: RateLimit,
}

#[derive(Debug, Default)]
struct State {
    file: u64,
    revision: u64,
    config: Option<String>,
    leases: BTreeMap<Subnet, Record>,
    /// The changes after revision `log_from`, oldest first.
    log: VecDeque<(u64, LeaseEvent)>,
    log_from: u64,
}

#[derive(Clone, Debug)]
struct Record {
    attrs: LeaseAttrs,
    revision: u64,
    ends: Option<Instant>,
}

#[derive(Debug)]
enum Change {
    Config(String),
    Put(Subnet, Record),
    Delete(Subnet),
}

/// Relates the monotonic clock to the wall clock as it was when the store was opened.
#[derive(Debug, Clone, Copy)]
struct Clock {
    wall: SystemTime,
    monotonic: Instant,
}

impl Clock {
    #[expect(
        clippy::disallowed_methods,
        reason = "ends of leases are kept in wall-clock time across restarts; it is read once"
    )]
    fn start() -> Self {
        Self {
            wall: SystemTime::now(),
            monotonic: Instant::now(),
        }
    }

    fn wall(self, at: Instant) -> SystemTime {
        self.wall + at.saturating_duration_since(self.monotonic)
    }

    fn millis(self, at: Instant) -> u64 {
        let since_1970 = self.wall(at).duration_since(UNIX_EPOCH).unwrap_or_default();
        u64::try_from(since_1970.as_millis()).unwrap_or(u64::MAX).max(1)
    }

    /// When a lease ends that was to end at `millis`, after a restart.
    fn revive(self, millis: u64, ttl: Duration) -> Instant {
        let left = millis.saturating_sub(self.millis(self.monotonic));
        self.monotonic + Duration::from_millis(left).max(GRACE).min(ttl)
    }
}

impl EmbeddedRegistry {
    fn open(path: &Path, ttl: Duration) -> Result<Self, StoreError> {
        let clock = Clock::start();
        let database = open_database(path)?;
        let state = load(&database, clock, ttl).map_err(|error| damaged(path, &error))?;
        let reached = watch::Sender::new(state.revision);
        Ok(Self(Arc::new(Inner {
            path: path.to_owned(),
            ttl,
            clock,
            writer: Mutex::new(Some(database)),
            state: Mutex::new(state),
            reached,
            complaints: RateLimit::default(),
        })))
    }

    async fn set_config(&self, text: &str) -> Result<(), StoreError> {
        const DOING: &str = "set the network config";
        NetworkConfig::parse(text).map_err(|error| refused(DOING, error.to_string()))?;
        let text = text.to_owned();
        self.write(DOING, move |_| vec![Change::Config(text)])
            .await
            .map(|_| ())
    }

    /// Runs `decide` on the state and carries out the changes it asks for, all or none; tells the state's new revision
    /// if there were any.
    async fn write(
        &self,
        doing: &'static str,
        decide: impl FnOnce(&State) -> Vec<Change> + Send + 'static,
    ) -> Result<Option<u64>, StoreError> {
        let inner = self.0.clone();
        // Should the caller give up meanwhile, the write is finished all the same.
        let written = tokio::task::spawn_blocking(move || inner.write(doing, decide)).await;
        written.unwrap_or_else(|error| Err(self.0.unavailable(doing, error.to_string())))
    }

    /// Takes out the leases that have ended.
    async fn expire(&self) {
        let now = Instant::now();
        if self.0.state().next_end().is_none_or(|end| end > now) {
            return;
        }
        let ended = move |state: &State| {
            let ended = state
                .leases
                .iter()
                .filter(|(_, record)| record.ends.is_some_and(|end| end <= now));
            ended.map(|(subnet, _)| Change::Delete(*subnet)).collect()
        };
        if let Err(error) = self.write("take out ended leases", ended).await
            && self.0.complaints.allows()
        {
            tracing::warn!(%error, "ended leases stay for now");
        }
    }

    async fn put_if(
        &self,
        doing: &'static str,
        condition: impl FnOnce(Option<&Record>) -> bool + Send + 'static,
        subnet: Subnet,
        attrs: &LeaseAttrs,
        lifetime: Lifetime,
    ) -> Result<Option<Entry>, StoreError> {
        self.expire().await;
        let ends = match lifetime {
            Lifetime::Forever => None,
            Lifetime::Ttl => Some(Instant::now() + self.0.ttl),
        };
        let record = Record {
            attrs: attrs.clone(),
            revision: 0,
            ends,
        };
        let change = Change::Put(subnet, record.clone());
        let written = self.write(doing, move |state| {
            if condition(state.leases.get(&subnet)) {
                vec![change]
            } else {
                vec![]
            }
        });
        Ok(written.await?.map(|revision| Entry {
            lease: self.0.lease(subnet, &record),
            revision,
        }))
    }

    /// What a watcher at `revision` has not heard yet, if anything.
    fn news(&self, file: u64, revision: u64) -> Option<WatchItem> {
        /// How many events one item carries at most, so that a watcher far behind does not hold up the state.
        const BATCH: usize = 1000;
        let state = self.0.state();
        if file != state.file || revision < state.log_from || revision > state.revision {
            return Some(self.0.snapshot(&state));
        }
        let start = state.log.partition_point(|(change, _)| *change <= revision);
        let batch: Vec<_> = state.log.range(start..).take(BATCH).cloned().collect();
        let last = batch.last()?.0;
        Some(WatchItem {
            update: LeaseUpdate::Events(batch.into_iter().map(|(_, event)| event).collect()),
            cursor: cursor(state.file, last),
        })
    }
}

impl Inner {
    fn state(&self) -> MutexGuard<'_, State> {
        // The state is changed by plain assignments that cannot panic half-way.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(
        &self,
        doing: &'static str,
        decide: impl FnOnce(&State) -> Vec<Change>,
    ) -> Result<Option<u64>, StoreError> {
        let mut writer = self.writer.lock().unwrap_or_else(PoisonError::into_inner);
        let database = match writer.take() {
            Some(database) => database,
            None => self.reopen(doing)?,
        };
        let (changes, revision) = {
            let state = self.state();
            (decide(&state), state.revision)
        };
        if changes.is_empty() {
            *writer = Some(database);
            return Ok(None);
        }
        persist(&database, self.clock, &changes, revision)
            .map_err(|error| self.unavailable(doing, error.to_string()))?;
        *writer = Some(database);
        let mut state = self.state();
        for change in changes {
            state.revision += 1;
            let revision = state.revision;
            match change {
                Change::Config(text) => state.config = Some(text),
                Change::Put(subnet, record) => {
                    state.note(LeaseEvent::Added(self.lease(subnet, &record)));
                    state.leases.insert(subnet, Record { revision, ..record });
                }
                Change::Delete(subnet) => {
                    state.note(LeaseEvent::Removed(subnet));
                    state.leases.remove(&subnet);
                }
            }
        }
        let revision = state.revision;
        drop(state);
        self.reached.send_replace(revision);
        Ok(Some(revision))
    }

    /// Opens the file again after a failed write. Whether that write made it is for the file to say.
    fn reopen(&self, doing: &'static str) -> Result<Database, StoreError> {
        let database =
            open_database(&self.path).map_err(|error| self.unavailable(doing, error.to_string()))?;
        let found = load(&database, self.clock, self.ttl).map_err(|error| damaged(&self.path, &error))?;
        let mut state = self.state();
        if found.file != state.file || found.revision != state.revision {
            tracing::warn!(
                memory = state.revision,
                file = found.revision,
                "the file and memory disagree; the file is right"
            );
            *state = found;
            self.reached.send_replace(state.revision);
        }
        Ok(database)
    }

    fn lease(&self, subnet: Subnet, record: &Record) -> Lease {
        Lease {
            subnet,
            attrs: record.attrs.clone(),
            expiration: match record.ends {
                None => Expiration::Never,
                Some(end) => Expiration::At(self.clock.wall(end)),
            },
            created: None,
        }
    }

    fn snapshot(&self, state: &State) -> WatchItem {
        let leases = state
            .leases
            .iter()
            .map(|(subnet, record)| self.lease(*subnet, record));
        WatchItem {
            update: LeaseUpdate::Snapshot(leases.collect()),
            cursor: cursor(state.file, state.revision),
        }
    }

    fn unavailable(&self, doing: &'static str, cause: String) -> StoreError {
        StoreError::Unavailable {
            doing,
            place: self.path.display().to_string(),
            cause,
        }
    }
}

impl State {
    fn note(&mut self, event: LeaseEvent) {
        self.log.push_back((self.revision, event));
        if self.log.len() > LOG
            && let Some((revision, _)) = self.log.pop_front()
        {
            self.log_from = revision;
        }
    }

    fn next_end(&self) -> Option<Instant> {
        self.leases.values().filter_map(|record| record.ends).min()
    }
}

impl Registry for EmbeddedRegistry {
    fn place(&self) -> String {
        format!("embedded {}", self.0.path.display())
    }

    fn config(&self) -> BoxFuture<'_, Result<String, StoreError>> {
        Box::pin(async move {
            let config = self.0.state().config.clone();
            config.ok_or_else(|| refused("read the network config", "none has been set".to_owned()))
        })
    }

    fn list(&self) -> BoxFuture<'_, Result<Vec<Entry>, StoreError>> {
        Box::pin(async move {
            self.expire().await;
            let state = self.0.state();
            let entries = state.leases.iter().map(|(subnet, record)| Entry {
                lease: self.0.lease(*subnet, record),
                revision: record.revision,
            });
            Ok(entries.collect())
        })
    }

    fn create<'a>(
        &'a self,
        subnet: Subnet,
        attrs: &'a LeaseAttrs,
        lifetime: Lifetime,
    ) -> BoxFuture<'a, Result<Option<Entry>, StoreError>> {
        Box::pin(self.put_if("create a lease", |found| found.is_none(), subnet, attrs, lifetime))
    }

    fn update<'a>(
        &'a self,
        subnet: Subnet,
        revision: u64,
        attrs: &'a LeaseAttrs,
        lifetime: Lifetime,
    ) -> BoxFuture<'a, Result<Option<Entry>, StoreError>> {
        let unchanged = move |found: Option<&Record>| found.is_some_and(|record| record.revision == revision);
        Box::pin(self.put_if("renew a lease", unchanged, subnet, attrs, lifetime))
    }

    fn delete(&self, subnet: Subnet, revision: u64) -> BoxFuture<'_, Result<bool, StoreError>> {
        Box::pin(async move {
            let written = self.write("delete a lease", move |state| {
                let unchanged = state
                    .leases
                    .get(&subnet)
                    .is_some_and(|record| record.revision == revision);
                if unchanged {
                    vec![Change::Delete(subnet)]
                } else {
                    vec![]
                }
            });
            Ok(written.await?.is_some())
        })
    }

    fn watch(&self, since: Option<Cursor>) -> BoxStream<'_, Result<WatchItem, StoreError>> {
        // No file has the number 0, so whoever comes without a cursor is told everything.
        let start = match since.as_ref().map(parse_cursor) {
            None => (0, 0),
            Some(Some(start)) => start,
            Some(None) => {
                let error = refused(
                    "watch the leases",
                    "the cursor is none of this kind of store".to_owned(),
                );
                return Box::pin(stream::once(async { Err(error) }));
            }
        };
        let reached = self.0.reached.subscribe();
        Box::pin(stream::unfold(
            (start, reached),
            move |((file, revision), mut reached)| async move {
                loop {
                    self.expire().await;
                    reached.mark_unchanged();
                    if let Some(item) = self.news(file, revision) {
                        let next = parse_cursor(&item.cursor)?;
                        return Some((Ok(item), (next, reached)));
                    }
                    // An end that could not be carried out is tried again in a second, not at once.
                    let next_end = self
                        .0
                        .state()
                        .next_end()
                        .map(|end| end.max(Instant::now() + RETRY));
                    let due = async {
                        match next_end {
                            Some(end) => tokio::time::sleep_until(end).await,
                            None => std::future::pending().await,
                        }
                    };
                    tokio::select! {
                        changed = reached.changed() => changed.ok()?,
                        () = due => {}
                    }
                }
            },
        ))
    }
}

/// The least time between two attempts to take out ended leases.
const RETRY: Duration = Duration::from_millis(200);

fn cursor(file: u64, revision: u64) -> Cursor {
    Cursor(format!("{file:x}.{revision}"))
}

fn parse_cursor(cursor: &Cursor) -> Option<(u64, u64)> {
    let (file, revision) = cursor.0.split_once('.')?;
    Some((u64::from_str_radix(file, 16).ok()?, revision.parse().ok()?))
}

fn refused(doing: &'static str, cause: String) -> StoreError {
    StoreError::Refused { doing, cause }
}

fn damaged(path: &Path, error: &dyn std::fmt::Display) -> StoreError {
    let cause = format!(
        "{} is damaged: {error}; restore it from a backup or move it away",
        path.display()
    );
    refused("open the store", cause)
}

fn open_database(path: &Path) -> Result<Database, StoreError> {
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
    if !file.metadata()?.is_file() {
        return Err(std::io::Error::other("not a regular file"));
    }
    Ok(file)
}

fn load(database: &Database, clock: Clock, ttl: Duration) -> Result<State, Box<dyn std::error::Error>> {
    let write = database.begin_write()?;
    {
        let mut numbers = write.open_table(NUMBERS)?;
        write.open_table(TEXTS)?;
        write.open_table(LEASES)?;
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
    let revision = number("revision")?;
    let mut state = State {
        file: number("file")?,
        revision,
        config: read
            .open_table(TEXTS)?
            .get("config")?
            .map(|text| text.value().to_owned()),
        log_from: revision,
        ..State::default()
    };
    for row in read.open_table(LEASES)?.iter()? {
        let (key, row) = row?;
        let (value, revision, ends) = row.value();
        let record = Record {
            attrs: LeaseAttrs::from_json(value.as_bytes())?,
            revision,
            ends: (ends != 0).then(|| clock.revive(ends, ttl)),
        };
        state.leases.insert(key.value().parse()?, record);
    }
    Ok(state)
}

fn persist(
    database: &Database,
    clock: Clock,
    changes: &[Change],
    mut revision: u64,
) -> Result<(), redb::Error> {
    let write = database.begin_write()?;
    {
        let mut texts = write.open_table(TEXTS)?;
        let mut leases = write.open_table(LEASES)?;
        for change in changes {
            revision += 1;
            match change {
                Change::Config(text) => {
                    texts.insert("config", text.as_str())?;
                }
                Change::Put(subnet, record) => {
                    let (key, value) = (subnet.to_string(), record.attrs.to_json());
                    let ends = record.ends.map_or(0, |end| clock.millis(end));
                    leases.insert(key.as_str(), (value.as_str(), revision, ends))?;
                }
                Change::Delete(subnet) => {
                    leases.remove(subnet.to_string().as_str())?;
                }
            }
        }
        write.open_table(NUMBERS)?.insert("revision", revision)?;
    }
    write.commit()?;
    Ok(())
}
