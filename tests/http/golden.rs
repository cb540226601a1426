//! Conversations of flannel's programs, v0.5.5 and v0.7.1, replayed from `tests/golden/remote`: their clients against our
//! server, our client against their servers.
//!
//! A file is a list of exchanges: a request (method and path, then the body), and what is answered after `---`: status,
//! content type, body. `... NAME` instead of an answer means that the request waits, and instead of a request that its answer is
//! looked at. `<name>` stands for what differs from run to run: whatever is there the first time, the same from then on;
//! `<name:key>` is the same as part of a path.

use std::collections::BTreeMap;
use std::fs;
use std::time::Duration;

use futures_util::StreamExt;
use kersey::control::store::{RemoteStore, Store, StoreError};
use kersey::lease::{Lease, LeaseAttrs, LeaseEvent, LeaseUpdate, Subnet};
use kersey::options::{ApiForm, ServeOptions};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinHandle;
use tokio::time::{sleep, timeout};

use crate::support::Running;

const OWN: &str =
    r#"{"PublicIP":"10.50.0.9","BackendType":"vxlan","BackendData":{"VtepMAC":"82:4b:b6:2f:54:4e"}}"#;

#[tokio::test]
async fn a_v0_7_1_client_lives_its_life_on_our_server() {
    replay("client-v0.7.1.txt", ApiForm::Flannel).await;
}

#[tokio::test]
async fn a_v0_5_5_client_lives_its_life_on_our_server() {
    replay("client-v0.5.5.txt", ApiForm::Flannel).await;
}

#[tokio::test]
async fn errors_are_worded_and_numbered_as_flannels() {
    replay("errors.txt", ApiForm::Flannel).await;
}

#[tokio::test]
async fn reservations_are_flannels() {
    replay("reservations.txt", ApiForm::Flannel).await;
}

#[tokio::test]
async fn the_kubernetes_proposals_paths_are_there_if_asked_for() {
    replay("kubernetes.txt", ApiForm::Kubernetes).await;
    let plain = Running::plain().await;
    assert_eq!(plain.ask("GET", "/network/config", "").await.0, 404);
}

#[tokio::test]
async fn our_client_lives_its_life_on_a_v0_7_1_server() {
    let server = FlannelServer::start("server-v0.7.1.txt").await;
    let store = &server.client;
    assert!(
        store
            .config()
            .await
            .unwrap()
            .starts_with(r#"{"Network":"10.0.0.0/8""#)
    );
    let attrs = LeaseAttrs::from_json(OWN.as_bytes()).unwrap();
    let lease = store.acquire(&attrs, None).await.unwrap();
    assert_eq!((lease.subnet, &lease.attrs), (subnet("10.15.208.0-20"), &attrs));
    let mut watch = store.watch(None);
    assert_eq!(told(&mut watch).await, LeaseUpdate::Snapshot(vec![lease.clone()]));
    let LeaseUpdate::Events(events) = told(&mut watch).await else {
        panic!("an event was sent");
    };
    assert!(matches!(&events[..], [LeaseEvent::Added(added)] if added.subnet == subnet("10.33.0.0-20")));
    assert_eq!(
        told(&mut watch).await,
        LeaseUpdate::Events(vec![LeaseEvent::Removed(subnet("10.33.0.0-20"))])
    );
    // Past the junk key, where flannel's own clients stay for ever.
    let LeaseUpdate::Snapshot(leases) = told(&mut watch).await else {
        panic!("a snapshot was asked for");
    };
    assert_eq!(leases.len(), 2);
    drop(watch);
    let lease = store.renew(&lease).await.unwrap();
    assert_eq!(
        lease.attrs, attrs,
        "what the server made of them is not taken over"
    );
    let lease: Lease = store.renew(&lease).await.unwrap();
    assert!(matches!(
        store.renew(&lease).await,
        Err(StoreError::LeaseLost { .. })
    ));
    let other = LeaseAttrs::from_json(br#"{"PublicIP":"10.50.0.77"}"#).unwrap();
    store.reserve(subnet("10.20.0.0-20"), &other).await.unwrap();
    store.unreserve(subnet("10.20.0.0-20")).await.unwrap();
    store.revoke(subnet("10.20.0.0-20")).await.unwrap();
    server.finish().await;
}

#[tokio::test]
async fn our_client_lives_its_life_on_a_v0_5_5_server() {
    let server = FlannelServer::start("server-v0.5.5.txt").await;
    let store = &server.client;
    assert!(store.config().await.unwrap().contains("192.168.0.0/16"));
    let attrs = LeaseAttrs::from_json(OWN.as_bytes()).unwrap();
    let lease = store.acquire(&attrs, None).await.unwrap();
    let mut watch = store.watch(None);
    assert_eq!(told(&mut watch).await, LeaseUpdate::Snapshot(vec![lease.clone()]));
    assert!(matches!(told(&mut watch).await, LeaseUpdate::Events(events) if events.len() == 1));
    assert_eq!(told(&mut watch).await, LeaseUpdate::Snapshot(vec![lease.clone()]));
    drop(watch);
    let error = store.revoke(lease.subnet).await.unwrap_err();
    assert!(matches!(error, StoreError::Refused { .. }), "{error}");
    server.finish().await;
}

/// Plays a client's part against our server.
async fn replay(file: &str, form: ApiForm) {
    let conversation = Conversation::read(file);
    let server = Running::with(ServeOptions {
        form,
        ..ServeOptions::plain("127.0.0.1:0".parse().unwrap())
    })
    .await;
    let mut words = Words::default();
    let mut waiting: BTreeMap<String, JoinHandle<Reply>> = BTreeMap::new();
    for exchange in &conversation.exchanges {
        let case = format!("{file}: {}", exchange.title);
        let sent = exchange.request.as_ref().map(|(line, body)| {
            let request = as_go_sends(
                &server.address,
                &conversation.agent,
                &words.fill(line),
                &words.fill(body),
            );
            tokio::spawn(send(server.address.clone(), request))
        });
        let sent = match (sent, &exchange.waits) {
            (Some(sent), Some(name)) => {
                sleep(Duration::from_millis(150)).await;
                assert!(!sent.is_finished(), "{case}: answered at once");
                waiting.insert(name.clone(), sent);
                continue;
            }
            (Some(sent), None) => sent,
            (None, Some(name)) => waiting.remove(name).expect(&case),
            (None, None) => panic!("{case}: nothing is asked"),
        };
        let reply = timeout(Duration::from_secs(10), sent)
            .await
            .expect(&case)
            .unwrap();
        let expected = exchange.answer.as_ref().expect(&case);
        assert_eq!(reply.status, expected.status, "{case}: {}", reply.body);
        assert_eq!(reply.content_type, expected.content_type, "{case}");
        words.meet(&expected.body, &reply.body, &case);
    }
}

struct Reply {
    status: u16,
    /// `-` if there is none.
    content_type: String,
    body: String,
}

/// The bytes of Go's HTTP library, v1.5 and v1.6.
fn as_go_sends(host: &str, agent: &str, line: &str, body: &str) -> String {
    let (length, kind) = if body.is_empty() {
        (String::new(), "")
    } else {
        (
            format!("Content-Length: {}\r\n", body.len()),
            "Content-Type: application/json\r\n",
        )
    };
    format!(
        "{line} HTTP/1.1\r\nHost: {host}\r\nUser-Agent: {agent}\r\n{length}{kind}Accept-Encoding: gzip\r\n\r\n{body}"
    )
}

async fn send(address: String, request: String) -> Reply {
    let mut stream = TcpStream::connect(&address).await.unwrap();
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut bytes = Vec::new();
    loop {
        let text = String::from_utf8_lossy(&bytes).into_owned();
        if let Some((head, body)) = text.split_once("\r\n\r\n") {
            let head = head.to_ascii_lowercase();
            let field = |name: &str| {
                let line = head.lines().find_map(|line| line.strip_prefix(name));
                line.map(|value| value.trim().to_owned())
            };
            let length: usize = field("content-length:").expect("a length").parse().unwrap();
            if body.len() == length {
                return Reply {
                    status: head.split(' ').nth(1).unwrap().parse().unwrap(),
                    content_type: field("content-type:").unwrap_or_else(|| "-".to_owned()),
                    body: body.to_owned(),
                };
            }
        }
        assert!(stream.read_buf(&mut bytes).await.unwrap() > 0, "cut off: {text}");
    }
}

/// Plays a server's part, and checks what it is asked.
struct FlannelServer {
    client: RemoteStore,
    serving: JoinHandle<()>,
}

impl FlannelServer {
    async fn start(file: &'static str) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let serving = tokio::spawn(async move {
            for exchange in Conversation::read(file).exchanges {
                let (mut stream, _) = listener.accept().await.unwrap();
                let (line, body) = read_request(&mut stream).await;
                let expected = exchange.request.unwrap();
                assert_eq!((line, body), expected, "{file}: {}", exchange.title);
                let answer = exchange.answer.unwrap();
                let kind = match answer.content_type.as_str() {
                    "-" => String::new(),
                    kind => format!("Content-Type: {kind}\r\n"),
                };
                let (status, length, body) = (answer.status, answer.body.len(), answer.body);
                let text = format!(
                    "HTTP/1.1 {status} X\r\n{kind}Content-Length: {length}\r\nConnection: close\r\n\r\n{body}"
                );
                stream.write_all(text.as_bytes()).await.unwrap();
            }
        });
        Self {
            client: RemoteStore::new(vec![address.parse().unwrap()]),
            serving,
        }
    }

    /// All of the conversation was had.
    async fn finish(self) {
        timeout(Duration::from_secs(5), self.serving)
            .await
            .expect("all is asked")
            .unwrap();
    }
}

async fn read_request(stream: &mut TcpStream) -> (String, String) {
    let mut bytes = Vec::new();
    loop {
        let text = String::from_utf8_lossy(&bytes).into_owned();
        if let Some((head, body)) = text.split_once("\r\n\r\n") {
            let length = head
                .to_ascii_lowercase()
                .lines()
                .find_map(|line| line.strip_prefix("content-length:")?.trim().parse().ok())
                .unwrap_or(0);
            if body.len() == length {
                let line = head.lines().next().unwrap();
                let line = line.strip_suffix(" HTTP/1.1").expect("HTTP/1.1");
                return (line.to_owned(), body.to_owned());
            }
        }
        assert!(stream.read_buf(&mut bytes).await.unwrap() > 0, "cut off: {text}");
    }
}

struct Conversation {
    agent: String,
    exchanges: Vec<Exchange>,
}

struct Exchange {
    title: String,
    /// Method and path; body.
    request: Option<(String, String)>,
    waits: Option<String>,
    answer: Option<Reply>,
}

impl Conversation {
    fn read(file: &str) -> Self {
        let text = fs::read_to_string(format!("tests/golden/remote/{file}")).unwrap();
        let mut parts = text.split("\n=== ");
        let head = parts.next().unwrap();
        let agent = head.lines().find_map(|line| line.strip_prefix("agent: "));
        let exchanges: Vec<Exchange> = parts.map(Exchange::read).collect();
        assert!(exchanges.len() > 3, "{file} is empty");
        Self {
            agent: agent.unwrap_or_default().to_owned(),
            exchanges,
        }
    }
}

impl Exchange {
    fn read(text: &str) -> Self {
        let (title, rest) = text.split_once('\n').unwrap();
        let (asked, answered) = match rest.split_once("--- ") {
            Some((asked, answered)) => (asked, Some(answered)),
            None => (rest, None),
        };
        let mut lines: Vec<&str> = asked.lines().filter(|line| !line.is_empty()).collect();
        let waits = match lines.last().and_then(|line| line.strip_prefix("... ")) {
            Some(name) => {
                lines.pop();
                Some(name.to_owned())
            }
            None => None,
        };
        let request = lines
            .split_first()
            .map(|(line, body)| ((*line).to_owned(), body.join("\n")));
        let answer = answered.map(|answered| {
            let (head, body) = answered.split_once('\n').unwrap();
            let (status, kind) = head.split_once(' ').unwrap();
            let (kind, end) = match kind.strip_suffix(" (no newline)") {
                Some(kind) => (kind, ""),
                None => (kind, "\n"),
            };
            let body = body.trim_end();
            Reply {
                status: status.parse().unwrap(),
                content_type: kind.to_owned(),
                body: if body.is_empty() {
                    String::new()
                } else {
                    format!("{body}{end}")
                },
            }
        });
        Self {
            title: title.to_owned(),
            request,
            waits,
            answer,
        }
    }
}

/// What the `<name>`s stand for.
#[derive(Default)]
struct Words(BTreeMap<String, String>);

impl Words {
    /// A text with each `<name>` replaced by what it stands for.
    fn fill(&self, text: &str) -> String {
        let mut filled = text.to_owned();
        for (name, value) in &self.0 {
            filled = filled.replace(&format!("<{name}>"), value);
            filled = filled.replace(&format!("<{name}:key>"), &value.replace('/', "-"));
        }
        filled
    }

    /// Compares a text with what came, and learns what new names stand for.
    fn meet(&mut self, expected: &str, text: &str, case: &str) {
        let mut pattern = String::from("(?s)^");
        let mut names = Vec::new();
        let filled = self.fill(expected);
        let mut rest = filled.as_str();
        while let Some((before, after)) = rest.split_once('<') {
            let (name, after) = after.split_once('>').expect(case);
            pattern += &regex::escape(before);
            // A reason is any text; everything else ends with a quotation mark.
            let free = ["why", "before", "after"]
                .iter()
                .any(|free| name.starts_with(free));
            pattern += if free { "(.+)" } else { "([^\"]+)" };
            names.push(name.to_owned());
            rest = after;
        }
        pattern += &regex::escape(rest);
        pattern += "$";
        let pattern = regex::Regex::new(&pattern).unwrap();
        let found = pattern
            .captures(text)
            .unwrap_or_else(|| panic!("{case}\nexpected {filled}\ngot      {text}"));
        for (index, name) in names.into_iter().enumerate() {
            self.0.insert(name, found[index + 1].to_owned());
        }
    }
}

async fn told(
    watch: &mut (impl futures_util::Stream<Item = Result<kersey::control::store::WatchItem, StoreError>> + Unpin),
) -> LeaseUpdate {
    let item = timeout(Duration::from_secs(5), watch.next()).await.expect("news");
    item.unwrap().unwrap().update
}

fn subnet(key: &str) -> Subnet {
    key.parse().unwrap()
}
