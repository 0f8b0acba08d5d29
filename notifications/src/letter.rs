//! What a dead letter says: the record as it was read, where that was, what was wrong, and when; in
//! a row as columns, in the topic as headers.

pub mod headers;
mod shown;
pub(crate) mod topic;

pub use self::shown::DeadLetter;

use std::fmt;

use rdkafka::{
    Message as _,
    message::{Header, Headers as _, OwnedHeaders, OwnedMessage, ToBytes},
};
use serde::Serialize;
use sha2::{Digest as _, Sha256};
use time::{OffsetDateTime, format_description::well_known::Rfc3339};

/// Header: the topic it was read from.
pub const ORIGIN_TOPIC: &str = "origin.topic";
/// Header: its partition there.
pub const ORIGIN_PARTITION: &str = "origin.partition";
/// Header: its offset there.
pub const ORIGIN_OFFSET: &str = "origin.offset";
/// Header: its timestamp there, milliseconds since 1970.
pub const ORIGIN_TIMESTAMP: &str = "origin.timestamp";
/// Header: the id of the cluster where it was read.
pub const ORIGIN_CLUSTER: &str = "origin.cluster";
/// Header: the SHA-256 of its value, in hexadecimal; of nothing where it has none.
pub const ORIGIN_SHA256: &str = "origin.sha256";
/// Header: [`Cause`] in a word.
pub const CAUSE: &str = "dead_letter.cause";
/// Header: what was wrong, for a person.
pub const ERROR: &str = "dead_letter.error";
/// Header: when it was put here, RFC 3339.
pub const TIME: &str = "dead_letter.time";
/// Header, only where it applies: what had to be left out, because the record was too long with all these headers.
pub const OMITTED: &str = "dead_letter.omitted";

/// All of them: what is put back goes without.
const OURS: [&str; 10] = [
    ORIGIN_CLUSTER,
    ORIGIN_SHA256,
    ORIGIN_TOPIC,
    ORIGIN_PARTITION,
    ORIGIN_OFFSET,
    ORIGIN_TIMESTAMP,
    CAUSE,
    ERROR,
    TIME,
    OMITTED,
];

/// The time of a record that has none.
pub const NO_TIME: i64 = -1;
/// How much of an error a header holds.
const ERROR_CHARS: usize = 500;

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

/// Which record a letter is about, wherever the letter lies: place and time alone are not enough, a
/// topic that was made anew has other records there.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Identity {
    /// The id of its cluster; empty for a letter of the release before, which did not say.
    pub cluster: String,
    /// Where it was read.
    pub place: Place,
    /// Its time there, milliseconds since 1970; -1: it has none.
    pub millis: i64,
    /// Of its value.
    pub sha256: [u8; 32],
}

/// A record that cannot be saved, and is not kept yet.
pub struct Letter {
    /// As it was read.
    pub record: OwnedMessage,
    /// Why it is dead.
    pub cause: Cause,
    /// The same for a person.
    pub error: String,
}

impl Letter {
    /// A letter about `record`. The error may quote it: cut, for a quotation of any length would
    /// not fit beside it, and without control characters, of which PostgreSQL takes no NUL.
    pub fn new(record: OwnedMessage, cause: Cause, error: &str) -> Letter {
        let printed = |c: char| if c.is_control() { ' ' } else { c };
        let error = error.chars().take(ERROR_CHARS).map(printed).collect();
        Letter {
            record,
            cause,
            error,
        }
    }

    /// Which record of that cluster it is about.
    pub fn identity(&self, cluster: &str) -> Identity {
        Identity {
            cluster: cluster.to_owned(),
            place: Place::of(&self.record),
            millis: self.record.timestamp().to_millis().unwrap_or(NO_TIME),
            sha256: hash(self.value()),
        }
    }

    /// Of the record.
    pub fn key(&self) -> Option<&[u8]> {
        self.record.key()
    }

    /// Of the record.
    pub fn value(&self) -> Option<&[u8]> {
        self.record.payload()
    }

    /// Of the record, as bytes.
    pub fn headers(&self) -> Vec<u8> {
        headers::encode(self.record.headers())
    }

    /// Bytes of what is kept of the record.
    pub fn size(&self) -> i64 {
        let parts = [self.key(), self.value()].map(|part| part.map_or(0, <[u8]>::len));
        i64::try_from(parts[0] + parts[1] + self.headers().len()).unwrap_or(i64::MAX)
    }
}

/// A letter as it is kept in its row.
#[derive(Clone, Debug)]
pub struct KeptLetter {
    /// Its row.
    pub id: i64,
    /// Which record it is about.
    pub identity: Identity,
    /// Of the record.
    pub key: Option<Vec<u8>>,
    /// Of the record.
    pub value: Option<Vec<u8>>,
    /// Of the record.
    pub headers: OwnedHeaders,
    /// [`Cause`] in a word.
    pub cause: String,
    /// What was wrong.
    pub error: String,
    /// When that was found.
    pub dead_at: OffsetDateTime,
}

impl KeptLetter {
    /// The record's own headers, unless they are too long, and ours.
    pub fn headers(&self, kept: Kept) -> OwnedHeaders {
        let Identity {
            cluster,
            place,
            millis,
            sha256,
        } = &self.identity;
        let millis = if *millis == NO_TIME {
            String::new()
        } else {
            millis.to_string()
        };
        let hash: String = sha256.iter().map(|byte| format!("{byte:02x}")).collect();
        let (own, omitted) = match kept {
            Kept::All => (self.headers.clone(), None),
            Kept::KeyAndHeaders => (self.headers.clone(), Some("value")),
            Kept::Nothing => (OwnedHeaders::new(), Some("value, key and headers")),
        };
        let all = with(own, ORIGIN_CLUSTER, cluster);
        let all = with(all, ORIGIN_SHA256, &hash);
        let all = with(all, ORIGIN_TOPIC, &place.topic);
        let all = with(all, ORIGIN_PARTITION, &place.partition.to_string());
        let all = with(all, ORIGIN_OFFSET, &place.offset.to_string());
        let all = with(all, ORIGIN_TIMESTAMP, &millis);
        let all = with(all, CAUSE, &self.cause);
        let all = with(all, ERROR, &self.error);
        let all = with(all, TIME, &text_of(self.dead_at));
        match omitted {
            Some(what) => with(all, OMITTED, what),
            None => all,
        }
    }
}

fn hash(value: Option<&[u8]>) -> [u8; 32] {
    Sha256::digest(value.unwrap_or_default()).into()
}

fn text_of(at: OffsetDateTime) -> String {
    at.format(&Rfc3339).unwrap_or_default()
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

impl Place {
    /// Where that record was read.
    pub fn of(record: &OwnedMessage) -> Place {
        Place {
            topic: record.topic().to_owned(),
            partition: record.partition(),
            offset: record.offset(),
        }
    }
}

/// Where the record of a letter of the topic was read.
pub fn origin(record: &OwnedMessage) -> Option<Place> {
    Some(Place {
        topic: header(record, ORIGIN_TOPIC)?,
        partition: header(record, ORIGIN_PARTITION)?.parse().ok()?,
        offset: header(record, ORIGIN_OFFSET)?.parse().ok()?,
    })
}

/// Whether a letter of the topic has all of its record.
pub fn is_whole(record: &OwnedMessage) -> bool {
    header(record, OMITTED).is_none()
}

/// Which record a letter of the topic is about, if it says so.
pub fn identity(record: &OwnedMessage) -> Option<Identity> {
    let millis = header(record, ORIGIN_TIMESTAMP).and_then(|millis| millis.parse().ok());
    let said = header(record, ORIGIN_SHA256).and_then(|said| unhex(&said));
    Some(Identity {
        cluster: header(record, ORIGIN_CLUSTER).unwrap_or_default(),
        place: origin(record)?,
        millis: millis.unwrap_or(NO_TIME),
        sha256: said.unwrap_or_else(|| hash(record.payload())),
    })
}

fn unhex(text: &str) -> Option<[u8; 32]> {
    let digit = |at: usize| u8::from_str_radix(text.get(at..at + 2)?, 16).ok();
    let bytes: Option<Vec<u8>> = (0..text.len()).step_by(2).map(digit).collect();
    bytes?.try_into().ok()
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

#[cfg(test)]
mod tests {
    use rdkafka::Timestamp;

    use super::*;

    fn record(value: &[u8], headers: Option<OwnedHeaders>) -> OwnedMessage {
        let (value, key) = (Some(value.to_vec()), Some(b"42".to_vec()));
        let at = Timestamp::CreateTime(1_772_359_200_000);
        OwnedMessage::new(value, key, "orders".to_owned(), at, 2, 133, headers)
    }

    fn letter() -> KeptLetter {
        let own = with(OwnedHeaders::new(), "traceparent", "00-ab");
        let record = record(b"{\x1b[2J", Some(own));
        let letter = Letter::new(record, Cause::Unreadable, "not an order event");
        KeptLetter {
            id: 5,
            identity: letter.identity("cluster"),
            key: letter.key().map(<[u8]>::to_vec),
            value: letter.value().map(<[u8]>::to_vec),
            headers: headers::decode(&letter.headers()),
            cause: letter.cause.as_str().to_owned(),
            error: letter.error.clone(),
            dead_at: OffsetDateTime::UNIX_EPOCH,
        }
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

        assert_eq!(identity(&lies), Some(letter().identity));
        let kept = DeadLetter::kept(&letter()).to_string();
        let (lies_at, says) = text.split_once("  ").expect("where it lies");
        assert_eq!(lies_at, "orders/2/133");
        assert_eq!(kept, format!("row 5  {says}"));

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
        assert_eq!(identity(&lies), Some(letter().identity), "told by its hash");
        let text = DeadLetter::read(&lies).to_string();
        assert!(text.contains("key ?") && text.ends_with("(value left out: too long)"));
        let foreign = DeadLetter::read(&record(&[b'y'; 1000], None));
        assert_eq!(foreign.origin, None);
        let text = foreign.to_string();
        assert!(text.contains("from ?") && text.ends_with("yyy…"), "{text}");
    }
}
