//! One order event, parsed from the JSON that comes through Kafka into values that can be saved.

use std::fmt;

use serde::Deserialize;
use time::{OffsetDateTime, UtcOffset, format_description::well_known::Rfc3339};

/// Telegram carries 4096 characters (Bot API, `sendMessage`), with some room. A longer text is refused when
/// the event is read, not when it is sent: that bounds a page of the history too.
pub const MAX_TEXT: usize = 4000;

/// Whose order it is; positive.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UserId(i64);

/// Which order; positive.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OrderId(i64);

impl UserId {
    /// `None` unless it is positive.
    pub fn new(id: i64) -> Option<UserId> {
        (id > 0).then_some(UserId(id))
    }

    /// The number itself.
    pub fn get(self) -> i64 {
        self.0
    }
}

impl OrderId {
    /// `None` unless it is positive.
    pub fn new(id: i64) -> Option<OrderId> {
        (id > 0).then_some(OrderId(id))
    }

    /// The number itself.
    pub fn get(self) -> i64 {
        self.0
    }
}

/// The status an order came to, spelled as the contract has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
pub enum Status {
    /// Received, nothing reserved yet.
    #[serde(rename = "new")]
    New,
    /// Every unit is reserved.
    #[serde(rename = "awaiting payment")]
    AwaitingPayment,
    /// Some unit was not to be had, none is reserved.
    #[serde(rename = "failed")]
    Failed,
    /// Paid, the units are written off.
    #[serde(rename = "payed")]
    Payed,
    /// Cancelled, the units are on sale again.
    #[serde(rename = "cancelled")]
    Cancelled,
}

impl Status {
    /// Every status there is.
    pub const ALL: [Status; 5] = [
        Status::New,
        Status::AwaitingPayment,
        Status::Failed,
        Status::Payed,
        Status::Cancelled,
    ];

    /// The contract's spelling.
    pub fn as_str(self) -> &'static str {
        match self {
            Status::New => "new",
            Status::AwaitingPayment => "awaiting payment",
            Status::Failed => "failed",
            Status::Payed => "payed",
            Status::Cancelled => "cancelled",
        }
    }

    /// Its place within an order: `new` comes first, `payed` or `cancelled` last.
    pub fn rank(self) -> i32 {
        match self {
            Status::New => 1,
            Status::AwaitingPayment | Status::Failed => 2,
            Status::Payed | Status::Cancelled => 3,
        }
    }
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// An event that can be saved.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Event {
    /// Whom it concerns.
    pub user: UserId,
    /// Which order.
    pub order: OrderId,
    /// Its place within the order, from 1; 0 = the event carried none.
    pub sequence: i32,
    /// What the order came to.
    pub status: Status,
    /// The publisher's words, if it had any.
    pub text: Option<String>,
    /// The publisher's time in UTC, if it had one, to the microsecond that the database keeps.
    pub occurred_at: Option<OffsetDateTime>,
}

/// Why a value is no event. The text goes into the header of a dead letter.
#[derive(Debug, thiserror::Error)]
pub enum Unreadable {
    /// A Kafka record without a value.
    #[error("no value")]
    Empty,
    /// Not JSON, a field missing, or of another type, or a status nobody knows.
    #[error("not an order event: {0}")]
    Json(#[from] serde_json::Error),
    /// A number or a text outside what it can be.
    #[error("impossible {field}: {problem}")]
    Impossible {
        /// The field as the event spells it.
        field: &'static str,
        /// What it must be.
        problem: &'static str,
    },
}

/// The event as it is written. Older publishers spell `UserID` and know nothing of the last two.
#[derive(Deserialize)]
struct Wire {
    #[serde(rename = "UserId", alias = "UserID")]
    user_id: i64,
    #[serde(rename = "OrderID")]
    order_id: i64,
    #[serde(rename = "Status")]
    status: Status,
    #[serde(rename = "Message")]
    message: Option<String>,
    #[serde(rename = "Sequence")]
    sequence: Option<i64>,
    #[serde(rename = "OccurredAt")]
    occurred_at: Option<String>,
}

impl Event {
    /// Reads the value of a Kafka record.
    pub fn parse(value: Option<&[u8]>) -> Result<Event, Unreadable> {
        let wire: Wire = serde_json::from_slice(value.ok_or(Unreadable::Empty)?)?;
        let text = wire.message.filter(|text| !text.trim().is_empty());
        if text
            .as_ref()
            .is_some_and(|text| text.chars().count() > MAX_TEXT)
        {
            return Err(impossible("Message", "must be at most 4000 characters"));
        }
        Ok(Event {
            user: UserId::new(wire.user_id).ok_or(impossible("UserId", "must be positive"))?,
            order: OrderId::new(wire.order_id).ok_or(impossible("OrderID", "must be positive"))?,
            sequence: wire.sequence.map_or(Ok(0), sequence)?,
            status: wire.status,
            text,
            occurred_at: wire.occurred_at.as_deref().map(occurred_at).transpose()?,
        })
    }
}

/// Where an event was read: partition and offset; the topic is the consumer's.
pub type Source = (i32, i64);

/// An event and how it came.
#[derive(Clone, Debug)]
pub struct Received {
    /// What it says.
    pub event: Event,
    /// When it happened: its own time, else Kafka's.
    pub at: OffsetDateTime,
    /// Where it was read.
    pub source: Source,
    /// The trace context of its publisher.
    pub traceparent: Option<String>,
}

impl Event {
    /// Its place within its order: its sequence, or the rank of its status.
    pub fn place(&self) -> i32 {
        if self.sequence > 0 {
            self.sequence
        } else {
            self.status.rank()
        }
    }
}

fn sequence(number: i64) -> Result<i32, Unreadable> {
    i32::try_from(number)
        .ok()
        .filter(|number| *number > 0)
        .ok_or(impossible("Sequence", "must be 1 to 2147483647"))
}

fn occurred_at(text: &str) -> Result<OffsetDateTime, Unreadable> {
    let bad = || impossible("OccurredAt", "must be a time as RFC 3339 has it");
    let at = OffsetDateTime::parse(text, &Rfc3339).map_err(|_| bad())?;
    let at = at.checked_to_offset(UtcOffset::UTC).ok_or_else(bad)?;
    // no question about the history reaches further
    let shown = (1..=9999).contains(&at.year());
    shown.then(|| to_microsecond(at)).ok_or_else(bad)
}

/// Cut to what a `timestamptz` keeps, so that an event read twice equals its row.
pub fn to_microsecond(at: OffsetDateTime) -> OffsetDateTime {
    at.replace_microsecond(at.microsecond()).unwrap_or(at)
}

fn impossible(field: &'static str, problem: &'static str) -> Unreadable {
    Unreadable::Impossible { field, problem }
}

#[cfg(test)]
mod tests {
    use time::macros::datetime;

    use super::*;

    fn parse(json: &str) -> Result<Event, Unreadable> {
        Event::parse(Some(json.as_bytes()))
    }

    #[test]
    fn reads_every_addition() {
        let event = parse(
            r#"{"UserId":7,"OrderID":12,"Status":"awaiting payment","Message":"pay","Sequence":2,"OccurredAt":"2026-03-01T02:03:04.123456789+03:00"}"#,
        )
        .expect("an event");
        assert_eq!(event.user.get(), 7);
        assert_eq!(event.order.get(), 12);
        assert_eq!(event.sequence, 2);
        assert_eq!(event.status, Status::AwaitingPayment);
        assert_eq!(event.text.as_deref(), Some("pay"));
        assert_eq!(
            event.occurred_at,
            Some(datetime!(2026-02-28 23:03:04.123456 UTC))
        );
    }

    #[test]
    fn reads_what_older_publishers_send() {
        let event =
            parse(r#"{"UserID":1,"OrderID":2,"Status":"payed","Message":null,"New":{"field":1}}"#)
                .expect("an event");
        assert_eq!(event.user.get(), 1);
        assert_eq!(
            (event.sequence, event.occurred_at, &event.text),
            (0, None, &None)
        );
    }

    #[test]
    fn reads_every_fixture_of_the_contract() {
        let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../proto/events");
        let (mut read, mut refused) = (0, 0);
        for (folder, readable) in [
            (folder.to_owned(), true),
            (format!("{folder}/poison"), false),
        ] {
            for entry in std::fs::read_dir(folder).expect("the fixtures") {
                let path = entry.expect("an entry").path();
                if path.extension().is_none_or(|extension| extension != "json") {
                    continue;
                }
                let value = std::fs::read(&path).expect("a fixture");
                let event = Event::parse(Some(&value));
                assert_eq!(event.is_ok(), readable, "{}: {event:?}", path.display());
                *(if readable { &mut read } else { &mut refused }) += 1;
            }
        }
        assert!(read >= 7 && refused >= 9, "{read} read, {refused} refused");
    }

    #[test]
    #[expect(clippy::too_many_lines, reason = "a table is read from top to bottom")]
    fn refuses_what_is_no_event() {
        let long = "x".repeat(MAX_TEXT + 1);
        for (json, problem) in [
            ("", "not an order event"),
            ("{\"UserId\":1", "not an order event"),
            ("[]", "not an order event"),
            (r#"{"OrderID":2,"Status":"new"}"#, "missing field `UserId`"),
            (r#"{"UserId":1,"Status":"new"}"#, "missing field `OrderID`"),
            (r#"{"UserId":1,"OrderID":2}"#, "missing field `Status`"),
            (
                r#"{"UserId":1,"UserID":1,"OrderID":2,"Status":"new"}"#,
                "duplicate field",
            ),
            (
                r#"{"UserId":"1","OrderID":2,"Status":"new"}"#,
                "invalid type",
            ),
            (
                r#"{"UserId":1,"OrderID":2,"Status":"paid"}"#,
                "unknown variant",
            ),
            (
                r#"{"UserId":0,"OrderID":2,"Status":"new"}"#,
                "impossible UserId",
            ),
            (
                r#"{"UserId":1,"OrderID":-2,"Status":"new"}"#,
                "impossible OrderID",
            ),
            (
                r#"{"UserId":1,"OrderID":2,"Status":"new","Sequence":0}"#,
                "impossible Sequence",
            ),
            (
                r#"{"UserId":1,"OrderID":2,"Status":"new","Sequence":2147483648}"#,
                "impossible Sequence",
            ),
            (
                r#"{"UserId":1,"OrderID":2,"Status":"new","OccurredAt":"yesterday"}"#,
                "impossible OccurredAt",
            ),
            (
                r#"{"UserId":1,"OrderID":2,"Status":"new","OccurredAt":"2026-02-29T00:00:00Z"}"#,
                "impossible OccurredAt",
            ),
            (
                r#"{"UserId":1,"OrderID":2,"Status":"new","OccurredAt":"0001-01-01T00:00:00+00:01"}"#,
                "impossible OccurredAt",
            ),
            (
                r#"{"UserId":1,"OrderID":2,"Status":"new","OccurredAt":"9999-12-31T23:59:59-23:59"}"#,
                "impossible OccurredAt",
            ),
            (
                &format!(r#"{{"UserId":1,"OrderID":2,"Status":"new","Message":"{long}"}}"#),
                "impossible Message",
            ),
        ] {
            let error = parse(json).expect_err(json).to_string();
            assert!(error.contains(problem), "{json}: {error}");
        }
        assert!(matches!(Event::parse(None), Err(Unreadable::Empty)));
        assert!(Event::parse(Some(&[0xff, 0xfe])).is_err());
    }
}
