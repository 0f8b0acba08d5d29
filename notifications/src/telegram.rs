//! Where messages go: Telegram's `sendMessage`, or the log when no key or no chat is configured. One call is one attempt;
//! what an answer means for the message, and for the sender, is decided here, what is done about it in `delivery`.

use std::time::Duration;

use platform::error::StartError;
use secrecy::{ExposeSecret, SecretString};
use serde::{Deserialize, Serialize};
use tracing::{Instrument as _, Span, field::Empty};

use crate::config::TelegramConfig;

/// A 429 that names no time; Telegram's own limits for one chat are per minute.
const DEFAULT_PAUSE: Duration = Duration::from_secs(30);
/// A 429 is believed up to here: a stand-in's nonsense must not silence the service for a year.
const LONGEST_PAUSE: Duration = Duration::from_secs(3600);
/// How much of an answer is read. A message that is told comes back in it, each character escaped, and what is cut short is no
/// answer: four times what the longest message makes.
const ANSWER_BYTES: usize = 256 * 1024;
/// How much of a refusal is kept as a reason.
const REASON_CHARS: usize = 300;
/// What a 400 says when the text is what is wrong; in capitals with underscores where it comes from behind the Bot API.
/// There is no list of what it can say: what is not here may be about the chat, which an operator can mend.
const ABOUT_THE_TEXT: [&str; 9] = [
    "message is too long",
    "message too long",
    "text is too long",
    "message text is empty",
    "message empty",
    "text must be non-empty",
    "text must be encoded in utf-8",
    "strings must be encoded in utf-8",
    "can't parse entities",
];

/// The way out.
#[derive(Clone)]
pub enum Channel {
    /// A chat behind the Bot API.
    Telegram(Telegram),
    /// The service's own log: it runs without Telegram.
    Log,
}

/// One chat behind the Bot API.
#[derive(Clone)]
pub struct Telegram {
    http: reqwest::Client,
    api_url: String,
    key: SecretString,
    chat: String,
}

/// What one attempt came to.
#[derive(Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It is told.
    Told,
    /// The message itself is refused; the same message will always be.
    Refused(String),
    /// It did not work out this time.
    Failed(String),
    /// Everyone is to wait this long; says nothing about the message.
    Paused(Duration),
}

#[derive(Serialize)]
struct SendMessage<'a> {
    chat_id: &'a str,
    text: &'a str,
}

/// What Telegram says, whichever it is; nothing at all if what came is not of Telegram.
#[derive(Default, Deserialize)]
struct Answer {
    #[serde(default)]
    ok: bool,
    #[serde(default)]
    description: String,
    #[serde(default)]
    parameters: Parameters,
}

#[derive(Default, Deserialize)]
struct Parameters {
    retry_after: Option<u64>,
}

impl Channel {
    /// Opens no connection: Telegram away at start does not stop the start.
    pub fn new(config: &TelegramConfig) -> Result<Channel, StartError> {
        if config.api_key.expose_secret().is_empty() || config.chat_id.is_empty() {
            return Ok(Channel::Log);
        }
        // reqwest comes without a provider here; an error means that one is installed already
        let _ = rustls::crypto::ring::default_provider().install_default();
        let http = reqwest::Client::builder()
            .timeout(config.timeout)
            .redirect(reqwest::redirect::Policy::none())
            .build()
            .map_err(|e| {
                StartError::new(
                    format!("preparing the Telegram client: {e}"),
                    "check the system's certificates",
                )
            })?;
        Ok(Channel::Telegram(Telegram {
            http,
            api_url: config.api_url.trim_end_matches('/').to_owned(),
            key: config.api_key.clone(),
            chat: config.chat_id.clone(),
        }))
    }

    /// Tells one message.
    pub async fn tell(&self, text: &str) -> Outcome {
        match self {
            Channel::Telegram(telegram) => telegram.send(text).await,
            Channel::Log => {
                tracing::info!(message.text = text, "told");
                // a line waits for nothing: without this a batch of them would hold its thread from the first to the last
                tokio::task::yield_now().await;
                Outcome::Told
            }
        }
    }
}

impl Telegram {
    async fn send(&self, text: &str) -> Outcome {
        let span = tracing::info_span!(
            "telegram.sendMessage",
            otel.kind = "client",
            http.status = Empty
        );
        let called = self.call(text).instrument(span).await;
        // without the URL: it holds the key, and this text goes to the log and to the database
        called.unwrap_or_else(|error| Outcome::Failed(describe(&error.without_url())))
    }

    async fn call(&self, text: &str) -> Result<Outcome, reqwest::Error> {
        let url = format!(
            "{}/bot{}/sendMessage",
            self.api_url,
            self.key.expose_secret()
        );
        let message = SendMessage {
            chat_id: &self.chat,
            text,
        };
        let response = self.http.post(url).json(&message).send().await?;
        let status = response.status();
        Span::current().record("http.status", status.as_u16());
        let header = response
            .headers()
            .get(reqwest::header::RETRY_AFTER)
            .and_then(|value| value.to_str().ok()?.parse().ok());
        let answer = match read(response).await {
            // nobody knows whether it is told
            Err(error) if status.is_success() => return Err(error),
            answer => answer.unwrap_or_default(),
        };
        Ok(judge(status.as_u16(), header, &answer))
    }
}

/// Reads an answer, a bounded part of it.
async fn read(mut response: reqwest::Response) -> Result<Answer, reqwest::Error> {
    let mut body = Vec::new();
    while let Some(chunk) = response.chunk().await? {
        let room = ANSWER_BYTES - body.len();
        body.extend_from_slice(&chunk[..chunk.len().min(room)]);
        if body.len() == ANSWER_BYTES {
            break;
        }
    }
    Ok(serde_json::from_slice(&body).unwrap_or_default())
}

/// Told is what Telegram says is: a proxy's page has a 200 too. Only a 413, and a 400 that says so, speak of the message. Any
/// other 400, as 401, 403 and 404, speaks of the key or the chat (not found, upgraded to a supergroup): an operator can mend
/// those while the message waits.
fn judge(status: u16, retry_after_header: Option<u64>, answer: &Answer) -> Outcome {
    let description: String = answer.description.chars().take(REASON_CHARS).collect();
    let reason = format!("HTTP {status} {description}").trim_end().to_owned();
    match status {
        200..300 if answer.ok => Outcome::Told,
        200..300 => Outcome::Failed(format!("no answer of Telegram's: {reason}")),
        429 => {
            let asked = answer.parameters.retry_after.or(retry_after_header);
            let pause = asked.map_or(DEFAULT_PAUSE, Duration::from_secs);
            // 0 would be a busy loop against a server that is asking for mercy
            Outcome::Paused(pause.clamp(Duration::from_secs(1), LONGEST_PAUSE))
        }
        413 => Outcome::Refused(reason),
        400 if is_about_the_text(&description) => Outcome::Refused(reason),
        _ => Outcome::Failed(reason),
    }
}

fn is_about_the_text(description: &str) -> bool {
    let description = description.to_lowercase().replace('_', " ");
    ABOUT_THE_TEXT
        .iter()
        .any(|about| description.contains(about))
}

/// The innermost cause says what happened (`connection refused`); reqwest's own text only that sending failed.
fn describe(error: &reqwest::Error) -> String {
    if error.is_timeout() {
        return "no answer in time".to_owned();
    }
    let mut cause: &dyn std::error::Error = error;
    while let Some(inner) = cause.source() {
        cause = inner;
    }
    format!("{error}: {cause}")
        .chars()
        .take(REASON_CHARS)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer(json: &str) -> Answer {
        serde_json::from_str(json).expect("an answer")
    }

    #[test]
    fn a_429_pauses_for_as_long_as_it_says() {
        let body = answer(
            r#"{"ok":false,"error_code":429,"description":"Too Many Requests","parameters":{"retry_after":7}}"#,
        );
        assert_eq!(
            judge(429, Some(3), &body),
            Outcome::Paused(Duration::from_secs(7))
        );
        assert_eq!(
            judge(429, Some(3), &Answer::default()),
            Outcome::Paused(Duration::from_secs(3))
        );
        assert_eq!(
            judge(429, None, &Answer::default()),
            Outcome::Paused(DEFAULT_PAUSE)
        );
        assert_eq!(
            judge(429, Some(0), &Answer::default()),
            Outcome::Paused(Duration::from_secs(1))
        );
        assert_eq!(
            judge(429, Some(u64::MAX), &Answer::default()),
            Outcome::Paused(LONGEST_PAUSE)
        );
    }

    #[test]
    fn told_is_what_telegram_says_is() {
        let told = answer(r#"{"ok":true,"result":{"message_id":1,"text":"order 1 is new"}}"#);
        assert_eq!(judge(200, None, &told), Outcome::Told);
        let failed = |why: &str| Outcome::Failed(format!("no answer of Telegram's: {why}"));
        let page = Answer::default();
        assert_eq!(judge(200, None, &page), failed("HTTP 200"));
        assert_eq!(judge(204, None, &page), failed("HTTP 204"));
        let not = answer(r#"{"ok":false,"description":"later"}"#);
        assert_eq!(judge(200, None, &not), failed("HTTP 200 later"));
        // whatever it says: it is not a 2xx
        assert_eq!(
            judge(500, None, &told),
            Outcome::Failed("HTTP 500".to_owned())
        );
    }

    #[test]
    fn only_the_message_s_own_fault_is_final() {
        for description in [
            "Bad Request: message is too long",
            "Bad Request: MESSAGE_TOO_LONG",
            "Bad Request: message text is empty",
            "Bad Request: text must be non-empty",
            "Bad Request: strings must be encoded in UTF-8",
            "Bad Request: can't parse entities: unsupported start tag",
        ] {
            let body = answer(&format!(r#"{{"ok":false,"description":"{description}"}}"#));
            assert_eq!(
                judge(400, None, &body),
                Outcome::Refused(format!("HTTP 400 {description}"))
            );
        }
        assert_eq!(
            judge(413, None, &Answer::default()),
            Outcome::Refused("HTTP 413".into())
        );
    }

    #[test]
    fn what_an_operator_can_mend_is_tried_again() {
        for description in [
            "Bad Request: chat not found",
            "Bad Request: chat_id is empty",
            "Bad Request: group chat was upgraded to a supergroup chat",
            "Bad Request: not enough rights to send text messages to the chat",
            "Bad Request: need administrator rights in the channel chat",
            "Bad Request: message thread not found",
            "Bad Request: PEER_ID_INVALID",
            "Bad Request: TOPIC_CLOSED",
        ] {
            let body = answer(&format!(r#"{{"ok":false,"description":"{description}"}}"#));
            assert_eq!(
                judge(400, None, &body),
                Outcome::Failed(format!("HTTP 400 {description}"))
            );
        }
        for status in [302, 400, 401, 403, 404, 408, 500, 502, 503] {
            assert_eq!(
                judge(status, None, &Answer::default()),
                Outcome::Failed(format!("HTTP {status}"))
            );
        }
    }
}
