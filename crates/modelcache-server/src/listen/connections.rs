//! The table of open connections: it enforces the limits on their number and chooses which one to close for a new one.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::{IpAddr, Ipv6Addr};
use std::sync::Arc;

use modelcache::mutex::Mutex;
use tokio::task::AbortHandle;

use super::activity::Activity;
use super::counters::ConnectionCounters;
use super::limits::STALL_EVICTABLE;

/// The table of open connections.
#[derive(Debug)]
pub(super) struct Connections {
    table: Mutex<Table>,
    counters: Arc<ConnectionCounters>,
    limit: usize,
    limit_per_address: usize,
}

#[derive(Debug, Default)]
struct Table {
    /// Number of the next connection, or of the next change to idle. Lower is older.
    next: u64,
    open: HashMap<u64, Connection>,
    per_address: HashMap<IpAddr, usize>,
    /// Connections that have never sent a complete request head.
    without_request: BTreeSet<u64>,
    /// Connections between two requests, by the order in which they became idle.
    idle: BTreeMap<u64, u64>,
}

#[derive(Debug)]
struct Connection {
    address: IpAddr,
    activity: Arc<Activity>,
    /// Set once the task is started.
    task: Option<AbortHandle>,
    /// Its key in [`Table::idle`].
    idle: Option<u64>,
}

/// The limit that a new connection would exceed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Full {
    Connections,
    Address,
}

impl Connections {
    pub(super) fn new(limit: usize, limit_per_address: usize, counters: Arc<ConnectionCounters>) -> Arc<Self> {
        Arc::new(Self { table: Mutex::default(), counters, limit, limit_per_address })
    }

    /// Adds a connection, closing another one if a limit is reached. `start` starts its task, which holds the given
    /// [`Entry`] as long as the connection is open.
    pub(super) fn admit(
        self: &Arc<Self>,
        address: IpAddr,
        start: impl FnOnce(Entry, Arc<Activity>) -> AbortHandle,
    ) -> Result<(), Full> {
        let address = client_network(address);
        let mut table = self.table.lock();
        if table.per_address.get(&address).is_some_and(|open| *open >= self.limit_per_address)
            && !table.evict(Some(address), &self.counters)
        {
            return Err(Full::Address);
        }
        if table.open.len() >= self.limit && !table.evict(None, &self.counters) {
            return Err(Full::Connections);
        }
        let id = table.next;
        table.next += 1;
        let activity = Arc::new(Activity::new());
        table.open.insert(id, Connection { address, activity: Arc::clone(&activity), task: None, idle: None });
        table.without_request.insert(id);
        *table.per_address.entry(address).or_default() += 1;
        self.counters.set_open(table.open.len());
        // A runtime that is shutting down drops a new task at once, and dropping the entry of the task locks the table.
        drop(table);
        let task = start(Entry { connections: Arc::clone(self), id }, activity);
        if let Some(connection) = self.table.lock().open.get_mut(&id) {
            connection.task = Some(task);
        }
        Ok(())
    }

    /// Closes one connection that runs no request, to free its descriptor. Returns false if there is none.
    pub(super) fn evict_one(&self) -> bool {
        self.table.lock().evict(None, &self.counters)
    }
}

impl Table {
    /// Closes one connection, of `address` if it is given: the oldest one without a complete request head, otherwise
    /// the one that has been idle longest, otherwise the one whose client has stalled longest. Returns false if there
    /// is none of these.
    fn evict(&mut self, address: Option<IpAddr>, counters: &ConnectionCounters) -> bool {
        let of_address = |id: &u64| {
            address.is_none_or(|address| self.open.get(id).is_some_and(|connection| connection.address == address))
        };
        // The end of the last response of an idle connection may still be on its way to a slow client.
        let sent = |id: &u64| self.open.get(id).is_some_and(|connection| connection.activity.stalled_for().is_none());
        let stalled = || {
            let stalled = self.open.iter().filter(|(id, _)| of_address(id));
            let stalled = stalled.filter_map(|(id, connection)| Some((connection.activity.stalled_for()?, *id)));
            stalled.filter(|(time, _)| *time >= STALL_EVICTABLE).max().map(|(_, id)| id)
        };
        let chosen = (self.without_request.iter().copied().find(of_address))
            .or_else(|| self.idle.values().copied().find(|id| of_address(id) && sent(id)))
            .or_else(stalled);
        let Some(id) = chosen else { return false };
        if let Some(task) = self.remove(id).and_then(|connection| connection.task) {
            task.abort();
            counters.count_evicted();
        }
        true
    }

    fn remove(&mut self, id: u64) -> Option<Connection> {
        let connection = self.open.remove(&id)?;
        self.without_request.remove(&id);
        if let Some(order) = connection.idle {
            self.idle.remove(&order);
        }
        if let Some(open) = self.per_address.get_mut(&connection.address) {
            *open -= 1;
            if *open == 0 {
                self.per_address.remove(&connection.address);
            }
        }
        Some(connection)
    }
}

/// The entry of one connection in the table. Dropping it removes the connection.
#[derive(Debug)]
pub(super) struct Entry {
    connections: Arc<Connections>,
    id: u64,
}

impl Entry {
    /// Records that a request head is complete.
    pub(super) fn request_started(&self) {
        let table = &mut *self.connections.table.lock();
        table.without_request.remove(&self.id);
        if let Some(order) = table.open.get_mut(&self.id).and_then(|connection| connection.idle.take()) {
            table.idle.remove(&order);
        }
    }

    /// Records that the response is complete.
    pub(super) fn response_ended(&self) {
        let table = &mut *self.connections.table.lock();
        if let Some(connection) = table.open.get_mut(&self.id) {
            let order = table.next;
            table.next += 1;
            connection.idle = Some(order);
            table.idle.insert(order, self.id);
        }
    }
}

impl Drop for Entry {
    fn drop(&mut self) {
        let mut table = self.connections.table.lock();
        table.remove(self.id);
        self.connections.counters.set_open(table.open.len());
    }
}

/// Returns what the limit per address counts: an IPv4 address, or the /64 network of an IPv6 address.
fn client_network(address: IpAddr) -> IpAddr {
    match address {
        IpAddr::V6(v6) => {
            let [a, b, c, d, ..] = v6.segments();
            Ipv6Addr::new(a, b, c, d, 0, 0, 0, 0).into()
        }
        IpAddr::V4(_) => address,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::future::pending;
    use tokio::time::Instant;

    struct Opened {
        connections: Arc<Connections>,
        entries: Vec<Arc<Entry>>,
        tasks: Vec<tokio::task::JoinHandle<()>>,
    }

    impl Opened {
        fn new(limit: usize, limit_per_address: usize) -> Self {
            let connections = Connections::new(limit, limit_per_address, Arc::default());
            Self { connections, entries: Vec::new(), tasks: Vec::new() }
        }

        fn open(&mut self, address: &str) -> Result<(), Full> {
            let (entries, tasks) = (&mut self.entries, &mut self.tasks);
            self.connections.admit(address.parse().expect("an address"), |entry, _| {
                let entry = Arc::new(entry);
                entries.push(Arc::clone(&entry));
                let task = tokio::spawn(async move {
                    let _entry = entry;
                    pending().await
                });
                let abort = task.abort_handle();
                tasks.push(task);
                abort
            })
        }

        async fn closed(&self) -> Vec<usize> {
            tokio::task::yield_now().await;
            (0..self.tasks.len()).filter(|at| self.tasks[*at].is_finished()).collect()
        }
    }

    #[tokio::test]
    async fn the_oldest_connection_without_a_request_is_closed_first_then_the_oldest_idle_one() {
        let mut opened = Opened::new(3, 3);
        for _ in 0..3 {
            opened.open("10.0.0.1").expect("room");
        }
        opened.entries[0].request_started();
        opened.open("10.0.0.2").expect("connection 1 makes room");
        assert_eq!(opened.closed().await, [1]);
        for id in [2, 3] {
            opened.entries[id].request_started();
        }
        assert_eq!(opened.open("10.0.0.3"), Err(Full::Connections), "all connections run requests");
        for id in [3, 0] {
            opened.entries[id].response_ended();
        }
        opened.open("10.0.0.3").expect("connection 3 makes room");
        assert_eq!(opened.closed().await, [1, 3]);
    }

    #[tokio::test]
    async fn an_address_at_its_limit_closes_a_connection_of_its_own() {
        let mut opened = Opened::new(10, 2);
        opened.open("10.0.0.1").expect("room");
        opened.open("2001:db8::1").expect("room");
        opened.open("2001:db8::2").expect("room");
        opened.open("2001:db8::3").expect("another connection of the network makes room");
        assert_eq!(opened.closed().await, [1]);
        for id in [2, 3] {
            opened.entries[id].request_started();
        }
        assert_eq!(opened.open("2001:db8::4"), Err(Full::Address));
        opened.open("2001:db8:0:1::1").expect("another network");
    }

    #[tokio::test]
    async fn a_connection_with_a_stalled_client_makes_room_after_ten_seconds() {
        let mut opened = Opened::new(1, 1);
        let connections = Arc::clone(&opened.connections);
        opened.open("10.0.0.1").expect("room");
        opened.entries[0].request_started();
        let activity = connections.table.lock().open.values().next().map(|open| Arc::clone(&open.activity));
        let activity = activity.expect("one connection");
        activity.set_stalled(true);
        assert_eq!(opened.open("10.0.0.2"), Err(Full::Connections));
        *activity.stalled_since.lock() = Instant::now().checked_sub(STALL_EVICTABLE);
        opened.open("10.0.0.2").expect("connection 0 makes room");
        assert_eq!(opened.closed().await, [0]);
    }
}
