//! The log as Graylog gets it: GELF frames over TCP, the same lines as on stdout; and a Graylog that is away, goes away, or
//! takes nothing must cost no call anything.

use std::{
    collections::BTreeSet,
    net::SocketAddr,
    path::Path,
    sync::{Arc, Mutex},
};

use devstack::{
    clients::http_client,
    ports::Reserved,
    stack::{Options, Stack},
};
use serde_json::{Value, json};
use sqlx::Connection as _;
use tokio::{
    io::{AsyncBufReadExt as _, BufReader},
    net::{TcpListener, TcpStream},
    task::JoinSet,
};

use crate::test_stack::{binaries, eventually};

/// A GELF TCP input; dropped, it and its connections are gone.
struct Graylog {
    frames: Arc<Mutex<Vec<Value>>>,
    _accepting: JoinSet<()>,
}

impl Graylog {
    fn start(listener: TcpListener) -> Graylog {
        let frames = Arc::new(Mutex::new(Vec::new()));
        let into = frames.clone();
        let mut accepting = JoinSet::new();
        accepting.spawn(async move {
            let mut reading = JoinSet::new();
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                reading.spawn(read(stream, into.clone()));
            }
        });
        Graylog {
            frames,
            _accepting: accepting,
        }
    }

    fn frames(&self) -> Vec<Value> {
        self.frames.lock().unwrap().clone()
    }

    async fn has(&self, what: &str, fits: impl Fn(&Value) -> bool) -> Value {
        eventually(what, async || self.frames().iter().any(&fits)).await;
        self.frames().into_iter().find(fits).unwrap()
    }
}

async fn read(stream: TcpStream, into: Arc<Mutex<Vec<Value>>>) {
    let mut stream = BufReader::new(stream);
    loop {
        let mut frame = Vec::new();
        // a connection that broke off ends with a frame that has no end
        if stream.read_until(0, &mut frame).await.is_err() || frame.pop() != Some(0) {
            return;
        }
        let frame = serde_json::from_slice(&frame).expect("a frame is JSON");
        into.lock().unwrap().push(frame);
    }
}

async fn listen(address: SocketAddr) -> TcpListener {
    TcpListener::bind(address).await.unwrap()
}

async fn loms(graylog: SocketAddr, settings: Value) -> Stack {
    let mut settings = settings;
    settings["graylog"] = json!({"host": graylog.ip().to_string(), "port": graylog.port()});
    let options = Options {
        quiet: true,
        services: &["loms"],
        settings: json!({"loms": settings}),
        ..Options::new(binaries().await)
    };
    Stack::start(&options).await.unwrap()
}

/// An order that does not exist is asked for; the trace of the answer.
async fn call(stack: &Stack) -> String {
    let url = format!("http://{}/listOrder", stack.service("loms").unwrap().http());
    let request = http_client().unwrap().post(url).body("{\"orderID\":77}");
    let answer = request.send().await.unwrap();
    assert_eq!(answer.status().as_u16(), 404);
    answer.headers()["x-trace-id"].to_str().unwrap().to_owned()
}

/// The lines of a log that are JSON.
fn lines(log: &Path) -> Vec<Value> {
    let text = std::fs::read_to_string(log).unwrap();
    text.lines()
        .filter_map(|line| serde_json::from_str(line).ok())
        .collect()
}

fn of_trace(frame: &Value, trace: &str) -> bool {
    frame["_trace_id"] == trace
}

#[tokio::test]
async fn every_line_is_a_frame_with_the_trace_of_its_call() {
    let port = Reserved::any().unwrap();
    let graylog = Graylog::start(listen(port.address()).await);
    let stack = loms(
        port.address(),
        json!({"log": {"level": "info,platform::grpc=debug"}}),
    )
    .await;
    let trace = call(&stack).await;
    let frame = graylog
        .has("the call's line", |frame| of_trace(frame, &trace))
        .await;
    assert_eq!(frame["short_message"], "call answered");
    assert_eq!(frame["_rpc.code"], "NotFound");
    assert_eq!(
        frame["_order.id"], 77,
        "what the span says belongs to the line"
    );
    // the stack's folder goes with the stack
    let kept = tempfile::tempdir().unwrap();
    let log = kept.path().join("loms.log");
    std::fs::hard_link(stack.service("loms").unwrap().log(), &log).unwrap();
    stack.stop().await.unwrap();
    graylog
        .has("the last words", |frame| {
            frame["short_message"] == "stopping"
        })
        .await;

    let lines: Vec<_> = lines(&log)
        .into_iter()
        .filter(|line| line["message"].is_string())
        .collect();
    let frames = graylog.frames();
    let told = |value: &Value, keys: [&str; 4]| keys.map(|key| value[key].to_string());
    let of_lines: BTreeSet<_> = lines
        .iter()
        .map(|line| told(line, ["message", "target", "trace_id", "span_id"]))
        .collect();
    let of_frames: BTreeSet<_> = frames
        .iter()
        .map(|frame| told(frame, ["short_message", "_target", "_trace_id", "_span_id"]))
        .collect();
    assert_eq!(of_lines, of_frames);
    let line = lines.iter().find(|line| line["trace_id"] == trace.as_str());
    assert_eq!(line.unwrap()["span_id"].as_str().map(str::len), Some(16));

    for frame in &frames {
        let frame = frame.as_object().unwrap();
        assert_eq!(
            (&frame["version"], &frame["_service"]),
            (&json!("1.1"), &json!("loms"))
        );
        assert!(!frame["host"].as_str().unwrap().is_empty());
        assert!(!frame["short_message"].as_str().unwrap().is_empty());
        assert!((0..=7).contains(&frame["level"].as_i64().unwrap()));
        let age = time::OffsetDateTime::now_utc().unix_timestamp() as f64
            - frame["timestamp"].as_f64().unwrap();
        assert!((-1.0..300.0).contains(&age), "{age}");
        for (name, value) in frame {
            // the specification's own pattern; "_id" is reserved
            let fine = |letter: char| letter.is_ascii_alphanumeric() || "_.-".contains(letter);
            assert!(name.chars().all(fine) && name != "_id", "{name}");
            assert!(value.is_string() || value.is_number(), "{name}: {value}");
        }
    }
}

#[tokio::test]
async fn a_line_knows_its_trace_whatever_the_level() {
    let port = Reserved::any().unwrap();
    let graylog = Graylog::start(listen(port.address()).await);
    // a statement that must be cut off is a warning in the log, and spans are less
    let settings = json!({"log": {"level": "warn"}, "postgres": {"lock_timeout": "50ms"}});
    let stack = loms(port.address(), settings).await;
    let url = stack.database("loms").unwrap();
    let mut db = sqlx::PgConnection::connect(url).await.unwrap();
    let setup =
        "BEGIN; INSERT INTO loms.user_order (id, user_id, status) VALUES (77, 1, 'new'); COMMIT;
                 BEGIN; SELECT FROM loms.user_order FOR UPDATE";
    sqlx::raw_sql(setup).execute(&mut db).await.unwrap();
    let url = format!(
        "http://{}/orderPayed",
        stack.service("loms").unwrap().http()
    );
    let request = http_client().unwrap().post(url).body("{\"orderID\":77}");
    let answer = request.send().await.unwrap();
    assert_eq!(answer.status().as_u16(), 503);
    let trace = answer.headers()["x-trace-id"].to_str().unwrap();
    let frame = graylog
        .has("the failure", |frame| {
            frame["short_message"] == "rows are locked by another transaction"
        })
        .await;
    assert!(of_trace(&frame, trace), "{frame}");
    let log = stack.service("loms").unwrap().log().to_owned();
    eventually("the same on stdout", async || {
        let lines = lines(&log);
        let line = lines
            .iter()
            .find(|line| line["message"] == "rows are locked by another transaction");
        line.is_some_and(|line| line["trace_id"] == trace)
    })
    .await;
    stack.stop().await.unwrap();
}

#[tokio::test]
async fn lines_wait_for_a_graylog_that_is_away() {
    let port = Reserved::any().unwrap();
    let settings = json!({"log": {"level": "info,platform::grpc=debug"}});
    let stack = loms(port.address(), settings).await;
    let early = call(&stack).await;
    let graylog = Graylog::start(listen(port.address()).await);
    graylog
        .has("what was said before it came", |frame| {
            of_trace(frame, &early)
        })
        .await;

    drop(graylog);
    let between = call(&stack).await;
    let graylog = Graylog::start(listen(port.address()).await);
    graylog
        .has("what was said while it was gone", |frame| {
            of_trace(frame, &between)
        })
        .await;
    let later = call(&stack).await;
    graylog
        .has("what was said after", |frame| of_trace(frame, &later))
        .await;
    stack.stop().await.unwrap();
}
