//! A stand-in of Telegram's Bot API on a port of its own: answers as a test says, and remembers what it was asked.

use std::{
    collections::HashMap,
    convert::Infallible,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use axum::{
    Json, Router,
    body::Body,
    extract::{Path, State},
    http::StatusCode,
    response::{IntoResponse as _, Response},
    routing::post,
};
use serde_json::{Value, json};
use tokio::{net::TcpListener, task::JoinSet};

/// The description of what it does not tell, where a test does not care.
const UNTOLD: &str = "as the test says";

const PAGE: &str = "<p>hello</p>";

/// What it answers to a text that contains a word.
#[derive(Clone, Copy)]
pub(crate) enum Answer {
    Status(u16),
    BadRequest(&'static str),
    RetryAfter(u64),
    Slow(Duration),
    /// As a proxy in between says hello: a 200 that is not of Telegram.
    Page,
    /// The same, and it never ends.
    EndlessPage,
}

/// One call, as it came.
#[derive(Clone, Debug)]
pub(crate) struct Call {
    pub(crate) path: String,
    pub(crate) body: Value,
    pub(crate) at: Instant,
}

#[derive(Clone, Default)]
struct Shared {
    /// By word: what is answered, and how many times before it is a 200 again.
    answers: Arc<Mutex<HashMap<String, (Answer, u32)>>>,
    calls: Arc<Mutex<Vec<Call>>>,
}

pub(crate) struct Telegram {
    pub(crate) url: String,
    shared: Shared,
    _server: JoinSet<()>,
}

impl Telegram {
    pub(crate) async fn start() -> Telegram {
        let shared = Shared::default();
        let routes = Router::new()
            .route("/{bot}/sendMessage", post(send_message))
            .with_state(shared.clone());
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let url = format!("http://{}", listener.local_addr().expect("an address"));
        let mut server = JoinSet::new();
        server.spawn(async move { axum::serve(listener, routes).await.expect("served") });
        Telegram {
            url,
            shared,
            _server: server,
        }
    }

    /// The next `times` texts that contain `word` are answered so.
    pub(crate) fn answer(&self, word: &str, answer: Answer, times: u32) {
        self.shared
            .answers
            .lock()
            .expect("no panic")
            .insert(word.to_owned(), (answer, times));
    }

    pub(crate) fn calls(&self) -> Vec<Call> {
        self.shared.calls.lock().expect("no panic").clone()
    }

    pub(crate) fn count(&self) -> usize {
        self.shared.calls.lock().expect("no panic").len()
    }

    /// What the texts that it was sent are about, up to their colons; refused ones included.
    pub(crate) fn texts(&self) -> Vec<String> {
        let about = |call: Call| {
            let text = call.body["text"].as_str().expect("a text");
            let (about, more) = text.split_once(": ").expect("more to say");
            assert!(more.ends_with('.'), "{text}");
            about.to_owned()
        };
        self.calls().into_iter().map(about).collect()
    }
}

async fn send_message(
    State(shared): State<Shared>,
    Path(path): Path<String>,
    Json(body): Json<Value>,
) -> Response {
    let text = body["text"].as_str().unwrap_or_default().to_owned();
    shared.calls.lock().expect("no panic").push(Call {
        path,
        body,
        at: Instant::now(),
    });
    let answer = {
        let mut answers = shared.answers.lock().expect("no panic");
        let found = answers
            .iter_mut()
            .find(|(word, (_, times))| text.contains(word.as_str()) && *times > 0);
        found.map(|(_, (answer, times))| {
            *times -= 1;
            *answer
        })
    };
    let (code, description, parameters) = match answer {
        None => return told(),
        Some(Answer::Slow(pause)) => {
            tokio::time::sleep(pause).await;
            return told();
        }
        Some(Answer::Page) => return PAGE.into_response(),
        Some(Answer::EndlessPage) => {
            let pages = futures::stream::repeat_with(|| Ok::<_, Infallible>(PAGE));
            return Body::from_stream(pages).into_response();
        }
        Some(Answer::Status(code)) => (code, UNTOLD, json!({})),
        Some(Answer::BadRequest(description)) => (400, description, json!({})),
        Some(Answer::RetryAfter(seconds)) => (429, UNTOLD, json!({"retry_after": seconds})),
    };
    let body = json!({"ok": false, "error_code": code, "description": description, "parameters": parameters});
    let code = StatusCode::from_u16(code).expect("a code");
    (code, Json(body)).into_response()
}

fn told() -> Response {
    Json(json!({"ok": true, "result": {"message_id": 1}})).into_response()
}
