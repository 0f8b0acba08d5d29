//! What a dead letter says: the record as it was read, and in the headers where that was, what was wrong, and when.

use std::fmt;

use rdkafka::{
    Message as _,
    message::{Header, Headers as _, OwnedHeaders, OwnedMessage, ToBytes},
};
use serde::Serialize;
use time::{OffsetDateTime, format_description::well_known::Rfc3339};

/// Header: the topic it was read from.
pub const ORIGIN_TOPIC: &str = "origin.topic";
/// Header: its partition there.
pub const ORIGIN_PARTITION: &str = "origin.partition";
/// Header: its offset there.
pub const ORIGIN_OFFSET: &str = "origin.offset";
/// Header: its timestamp there, milliseconds since 1970.
pub const ORIGIN_TIMESTAMP: &str = "origin.timestamp";
/// Header: [`Cause`] in a word.
pub const CAUSE: &str = "dead_letter.cause";
/// Header: what was wrong, for a person.
pub const ERROR: &str = "dead_letter.error";
/// Header: when it was put here, RFC 3339.
pub const TIME: &str = "dead_letter.time";
/// Header, only where it applies: what had to be left out, because the record was too long with all these headers.
pub const OMITTED: &str = "dead_letter.omitted";

/// All of them: what is put back goes without.
const OURS: [&str; 8] = [
    ORIGIN_TOPIC,
    ORIGIN_PARTITION,
    ORIGIN_OFFSET,
    ORIGIN_TIMESTAMP,
    CAUSE,
    ERROR,
    TIME,
    OMITTED,
];

/// How much of an error a header holds.
const ERROR_CHARS: usize = 500;
/// How much of a value a person is shown.
const SHOWN_CHARS: usize = 300;

/// Why a record is dead.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cause {
    /// It is no event.
    Unreadable,
    /// The database refuses what it says.
    Refused,
    /// Another event has its place within the order.
    Conflict,
}

impl Cause {
    /// Each of them.
    pub const ALL: [Cause; 3] = [Cause::Unreadable, Cause::Refused, Cause::Conflict];

    /// Itself in a word, for a header and a metric.
    pub fn as_str(self) -> &'static str {
        match self {
            Cause::Unreadable => "unreadable",
            Cause::Refused => "refused",
            Cause::Conflict => "conflict",
        }
    }
}

/// How much of a record a letter carries beside our headers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kept {
    /// What came.
    All,
    /// Not the value: with our headers the record would be too long.
    KeyAndHeaders,
    /// Not even those.
    Nothing,
}

/// A record on its way to the dead-letter topic.
pub struct Letter {
    /// As it was read.
    pub record: OwnedMessage,
    /// Why it is dead.
    pub cause: Cause,
    /// The same for a person.
    pub error: String,
}

impl Letter {
    /// A letter about `record`. The error may quote it, and a quotation of any length would not fit beside it.
    pub fn new(record: OwnedMessage, cause: Cause, error: &str) -> Letter {
        let error = error.chars().take(ERROR_CHARS).collect();
        Letter {
            record,
            cause,
            error,
        }
    }

    /// The record's own headers, unless they are too long, and ours.
    pub fn headers(&self, kept: Kept) -> OwnedHeaders {
        let record = &self.record;
        let now = OffsetDateTime::now_utc()
            .format(&Rfc3339)
            .unwrap_or_default();
        let millis = record.timestamp().to_millis();
        let millis = millis.map(|millis| millis.to_string()).unwrap_or_default();
        let (own, omitted) = match kept {
            Kept::All => (record.headers(), None),
            Kept::KeyAndHeaders => (record.headers(), Some("value")),
            Kept::Nothing => (None, Some("value, key and headers")),
        };
        let all = own.cloned().unwrap_or_default();
        let all = with(all, ORIGIN_TOPIC, record.topic());
        let all = with(all, ORIGIN_PARTITION, &record.partition().to_string());
        let all = with(all, ORIGIN_OFFSET, &record.offset().to_string());
        let all = with(all, ORIGIN_TIMESTAMP, &millis);
        let all = with(all, CAUSE, self.cause.as_str());
        let all = with(all, ERROR, &self.error);
        let all = with(all, TIME, &now);
        match omitted {
            Some(what) => with(all, OMITTED, what),
            None => all,
        }
    }
}

fn with<V: ToBytes + ?Sized>(headers: OwnedHeaders, key: &str, value: &V) -> OwnedHeaders {
    headers.insert(Header {
        key,
        value: Some(value),
    })
}

/// Where a record was read.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize)]
pub struct Place {
    /// The topic.
    pub topic: String,
    /// Its partition.
    pub partition: i32,
    /// The offset there.
    pub offset: i64,
}

/// A dead letter as it lies in its topic. What somebody else put there says less.
#[derive(Debug, Serialize)]
pub struct DeadLetter {
    /// Where it lies.
    #[serde(flatten)]
    pub place: Place,
    /// When it was put there, RFC 3339.
    pub time: Option<String>,
    /// [`Cause`] in a word.
    pub cause: Option<String>,
    /// What was wrong.
    pub error: Option<String>,
    /// Where it was read.
    pub origin: Option<Place>,
    /// Its key, as far as it is text.
    pub key: Option<String>,
    /// Its value, as far as it is text.
    pub value: Option<String>,
    /// What had to be left out: it cannot be put back.
    pub omitted: Option<String>,
}

impl DeadLetter {
    /// Reads the headers of a record of the dead-letter topic.
    pub fn read(record: &OwnedMessage) -> DeadLetter {
        let origin = || {
            Some(Place {
                topic: header(record, ORIGIN_TOPIC)?,
                partition: header(record, ORIGIN_PARTITION)?.parse().ok()?,
                offset: header(record, ORIGIN_OFFSET)?.parse().ok()?,
            })
        };
        let text = |bytes: Option<&[u8]>| bytes.map(|b| String::from_utf8_lossy(b).into_owned());
        DeadLetter {
            place: Place {
                topic: record.topic().to_owned(),
                partition: record.partition(),
                offset: record.offset(),
            },
            time: header(record, TIME),
            cause: header(record, CAUSE),
            error: header(record, ERROR),
            origin: origin(),
            key: text(record.key()),
            value: text(record.payload()),
            omitted: header(record, OMITTED),
        }
    }
}

/// What the record was before it was dead: its time there, and its own headers.
pub fn original(record: &OwnedMessage) -> (Option<i64>, OwnedHeaders) {
    let timestamp = header(record, ORIGIN_TIMESTAMP).and_then(|millis| millis.parse().ok());
    let headers = record.headers().into_iter().flat_map(|all| all.iter());
    let own = headers
        .filter(|header| !OURS.contains(&header.key))
        .fold(OwnedHeaders::new(), |own, header| own.insert(header));
    (timestamp, own)
}

/// The last header of that name: a letter that was dead before has the newest there.
fn header(record: &OwnedMessage, key: &str) -> Option<String> {
    let headers = record.headers()?;
    let named = headers.iter().filter(|header| header.key == key);
    let value = named.last()?.value?;
    Some(String::from_utf8_lossy(value).into_owned())
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}/{}", self.topic, self.partition, self.offset)
    }
}

impl fmt::Display for DeadLetter {
    /// Three lines, as `topic/partition/offset`: where it lies and comes from, what was wrong, what it says.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let known = |text: &Option<String>| shown(text.as_deref().unwrap_or("?"));
        let origin = self.origin.as_ref().map(Place::to_string);
        writeln!(
            f,
            "{}  {}  {}  from {}  key {}",
            self.place,
            known(&self.time),
            known(&self.cause),
            known(&origin),
            known(&self.key)
        )?;
        writeln!(f, "    {}", known(&self.error))?;
        match (&self.value, &self.omitted) {
            (Some(value), _) => write!(f, "    {}", shown(value)),
            (None, Some(what)) => write!(f, "    ({} left out: too long)", shown(what)),
            (None, None) => write!(f, "    (no value)"),
        }
    }
}

/// Whoever writes to the topic must not write to an operator's terminal: control characters are spelled out.
fn shown(text: &str) -> String {
    let mut shown = String::with_capacity(text.len().min(SHOWN_CHARS));
    for (count, character) in text.chars().enumerate() {
        if count == SHOWN_CHARS {
            shown.push('…');
            break;
        }
        if character.is_control() {
            shown.extend(character.escape_default());
        } else {
            shown.push(character);
        }
    }
    shown
}

#[cfg(test)]
mod tests {
    use rdkafka::Timestamp;

    use super::*;

    fn record(value: &[u8], headers: Option<OwnedHeaders>) -> OwnedMessage {
        let (value, key) = (Some(value.to_vec()), Some(b"42".to_vec()));
        let at = Timestamp::CreateTime(1_772_359_200_000);
        OwnedMessage::new(value, key, "orders".to_owned(), at, 2, 133, headers)
    }

    fn letter() -> Letter {
        let own = with(OwnedHeaders::new(), "traceparent", "00-ab");
        let record = record(b"{\x1b[2J", Some(own));
        Letter::new(record, Cause::Unreadable, "not an order event")
    }

    #[test]
    fn a_letter_says_where_it_came_from_and_gives_back_what_it_was() {
        let lies = record(b"{\x1b[2J", Some(letter().headers(Kept::All)));
        let read = DeadLetter::read(&lies);
        let origin = read.origin.as_ref().expect("an origin");
        assert_eq!(origin.to_string(), "orders/2/133");
        assert_eq!(read.cause.as_deref(), Some("unreadable"));
        let text = read.to_string();
        assert!(
            text.ends_with("    not an order event\n    {\\u{1b}[2J"),
            "{text}"
        );
        assert!(
            text.contains("  unreadable  from orders/2/133  key 42\n"),
            "{text}"
        );

        let (timestamp, headers) = original(&lies);
        assert_eq!(timestamp, Some(1_772_359_200_000));
        let left: Vec<_> = headers
            .iter()
            .map(|header| (header.key, header.value))
            .collect();
        assert_eq!(left, [("traceparent", Some(&b"00-ab"[..]))]);
    }

    #[test]
    fn what_is_left_out_and_what_is_not_ours_is_said() {
        let mut lies = record(b"x", Some(letter().headers(Kept::KeyAndHeaders)));
        lies = OwnedMessage::new(
            None,
            None,
            "orders.dlq".to_owned(),
            lies.timestamp(),
            0,
            7,
            lies.headers().cloned(),
        );
        let text = DeadLetter::read(&lies).to_string();
        assert!(text.contains("key ?") && text.ends_with("(value left out: too long)"));
        let foreign = DeadLetter::read(&record(&[b'y'; 1000], None));
        assert_eq!(foreign.origin, None);
        let text = foreign.to_string();
        assert!(text.contains("from ?") && text.ends_with("yyy…"), "{text}");
    }
}
