//! The log as GELF over TCP for Graylog: JSON objects that a NUL ends. Lines wait in a bounded buffer for a connection that is
//! made again whenever it breaks; a full buffer loses lines, counts them, and never makes a request wait.

use std::time::Duration;

use prometheus::IntCounter;
use serde_json::{Map, Value, json};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{
        TcpStream,
        tcp::{OwnedReadHalf, OwnedWriteHalf},
    },
    sync::{mpsc, oneshot},
    time::timeout,
};
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::{Layer, layer::Context, registry::LookupSpan};

use crate::{
    config::GraylogConfig,
    grpc::registered,
    log::{Limiter, Line},
    tasks,
};

/// Lines that wait for a connection: some seconds of a busy service, about 5 MB.
const BUFFER: usize = 10_000;
/// Between attempts to connect; Graylog takes a minute to start.
const RETRY: Duration = Duration::from_secs(2);
/// A server that takes nothing for so long is left, and called again.
const PATIENCE: Duration = Duration::from_secs(10);

/// The layer that makes frames.
pub(crate) struct Gelf {
    service: &'static str,
    host: String,
    frames: mpsc::Sender<Item>,
    lost: IntCounter,
    limiter: Limiter,
}

/// What [`flush`](Flush::flush) waits with.
pub(crate) struct Flush(mpsc::Sender<Item>);

enum Item {
    Frame(Vec<u8>),
    /// Answered when everything before it is written.
    Flush(oneshot::Sender<()>),
}

/// The layer, and the way to empty its buffer. The connection is made in the background.
pub(crate) fn layer(service: &'static str, config: &GraylogConfig) -> (Gelf, Flush) {
    let (frames, waiting) = mpsc::channel(BUFFER);
    let host = hostname::get().map(|name| name.to_string_lossy().into_owned());
    let gelf = Gelf {
        service,
        // a frame without one is refused
        host: host.unwrap_or_else(|_| service.to_owned()),
        frames: frames.clone(),
        lost: registered(IntCounter::new(
            format!("{service}_counter_log_lines_lost_total"),
            "Log lines that Graylog did not get because the buffer for it was full.",
        )),
        limiter: Limiter::default(),
    };
    let address = (config.host.clone(), config.port);
    tasks::spawn(send(address, waiting));
    (gelf, Flush(frames))
}

impl Flush {
    /// Resolves when all lines of before are written to the connection. The caller bounds it.
    pub(crate) async fn flush(self) {
        let (done, written) = oneshot::channel();
        if self.0.send(Item::Flush(done)).await.is_ok() {
            written.await.ok();
        }
    }
}

impl<S> Layer<S> for Gelf
where
    S: Subscriber + for<'a> LookupSpan<'a>,
{
    fn on_event(&self, event: &Event<'_>, ctx: Context<'_, S>) {
        let line = Line::of(event, ctx.event_span(event));
        let Some(line) = line.within(&self.limiter, event.metadata()) else {
            return;
        };
        let frame = frame(self.service, &self.host, line);
        if self.frames.try_send(Item::Frame(frame)).is_err() {
            self.lost.inc();
        }
    }
}

fn frame(service: &str, host: &str, line: Line) -> Vec<u8> {
    let mut object = Map::new();
    object.insert("version".into(), "1.1".into());
    object.insert("host".into(), host.into());
    // it must not be empty
    let message = Some(line.message).filter(|text| !text.is_empty());
    object.insert(
        "short_message".into(),
        message.unwrap_or_else(|| "-".into()).into(),
    );
    object.insert("timestamp".into(), json!(seconds(line.at)));
    object.insert("level".into(), severity(line.level).into());
    object.insert("_service".into(), service.into());
    object.insert("_target".into(), line.target.into());
    if let Some(span) = line.span {
        object.insert("_span".into(), span.into());
    }
    if let Some((trace_id, span_id)) = line.ids {
        object.insert("_trace_id".into(), trace_id.into());
        object.insert("_span_id".into(), span_id.into());
    }
    for (name, value) in line.fields {
        // of JSON's types GELF knows numbers and text
        let value = match value {
            Value::Number(_) | Value::String(_) => value,
            other => other.to_string().into(),
        };
        object.entry(format!("_{name}")).or_insert(value);
    }
    let mut bytes = Value::Object(object).to_string().into_bytes();
    bytes.push(0);
    bytes
}

/// Since 1970, with milliseconds.
fn seconds(at: time::OffsetDateTime) -> f64 {
    (at.unix_timestamp_nanos() / 1_000_000) as f64 / 1_000.0
}

/// As syslog has it.
fn severity(level: Level) -> u8 {
    match level {
        Level::ERROR => 3,
        Level::WARN => 4,
        Level::INFO => 6,
        _ => 7,
    }
}

async fn send(address: (String, u16), mut waiting: mpsc::Receiver<Item>) {
    // what was not written whole is written again
    let mut unwritten = None;
    let mut away = false;
    loop {
        let connected = timeout(PATIENCE, TcpStream::connect(&address)).await;
        match connected.unwrap_or_else(|late| Err(late.into())) {
            Ok(stream) => {
                if std::mem::take(&mut away) {
                    tracing::info!(graylog.host = %address.0, "graylog is back");
                }
                let (from, to) = stream.into_split();
                if write(from, to, &mut waiting, &mut unwritten)
                    .await
                    .is_none()
                {
                    return;
                }
            }
            Err(error) => {
                if !std::mem::replace(&mut away, true) {
                    tracing::warn!(graylog.host = %address.0, error = %error, "graylog is away");
                }
            }
        }
        tokio::time::sleep(RETRY).await;
    }
}

/// Writes until the connection breaks. `None`: there will be nothing more to write.
async fn write(
    mut from: OwnedReadHalf,
    mut to: OwnedWriteHalf,
    waiting: &mut mpsc::Receiver<Item>,
    unwritten: &mut Option<Vec<u8>>,
) -> Option<()> {
    let mut nothing = [0; 64];
    loop {
        let item = match unwritten.take() {
            Some(frame) => Item::Frame(frame),
            None => tokio::select! {
                // a server that closes says so here; otherwise the next line would be written to nobody
                read = from.read(&mut nothing) => match read {
                    Ok(0) | Err(_) => return Some(()),
                    Ok(_) => continue,
                },
                item = waiting.recv() => item?,
            },
        };
        match item {
            Item::Frame(frame) => {
                if !matches!(timeout(PATIENCE, to.write_all(&frame)).await, Ok(Ok(()))) {
                    *unwritten = Some(frame);
                    return Some(());
                }
            }
            Item::Flush(done) => drop(done.send(())),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use tracing_subscriber::layer::SubscriberExt as _;

    use super::*;

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn a_graylog_that_takes_nothing_holds_up_nobody() {
        // accepted by the kernel, read by nobody
        let deaf = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = deaf.local_addr().unwrap();
        let config = GraylogConfig {
            host: address.ip().to_string(),
            port: address.port(),
        };
        let (gelf, flush) = layer("deaf", &config);
        let lost = gelf.lost.clone();
        let lines = tracing_subscriber::registry().with(gelf);
        let long = "x".repeat(4_000);
        let slowest = tracing::subscriber::with_default(lines, || {
            let (mut slowest, by) = (Duration::ZERO, Instant::now() + Duration::from_secs(60));
            // the buffer, and what the kernel takes for the two sockets
            while lost.get() < 1_000 {
                assert!(Instant::now() < by, "the buffer never filled");
                let began = Instant::now();
                tracing::info!(filler = long, "said to nobody");
                slowest = slowest.max(began.elapsed());
            }
            slowest
        });
        assert!(slowest < Duration::from_secs(5), "{slowest:?}");
        // whoever stops has a bound of his own for this, and needs it
        let flushed = timeout(Duration::from_millis(100), flush.flush()).await;
        assert!(flushed.is_err(), "nobody has read the lines");
    }

    #[test]
    fn a_frame_has_what_graylog_requires() {
        let line = Line {
            at: time::OffsetDateTime::from_unix_timestamp_nanos(1_700_000_000_250_000_000).unwrap(),
            level: Level::WARN,
            target: "loms::outbox",
            message: String::new(),
            span: None,
            ids: None,
            fields: Map::from_iter([
                ("order.id".to_owned(), json!(7)),
                ("ready".to_owned(), json!(true)),
                ("service".to_owned(), json!("mine")),
            ]),
        };
        let bytes = frame("loms", "h1", line);
        assert_eq!(bytes.last(), Some(&0));
        let object: Value = serde_json::from_slice(&bytes[..bytes.len() - 1]).unwrap();
        assert_eq!(
            object,
            json!({"version": "1.1", "host": "h1", "short_message": "-", "timestamp": 1_700_000_000.25,
                   "level": 4, "_service": "loms", "_target": "loms::outbox", "_order.id": 7, "_ready": "true"})
        );
    }
}
