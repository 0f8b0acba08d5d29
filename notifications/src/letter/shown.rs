//! A dead letter as an operator sees it: from its row, from the topic, or both.

use std::fmt;

use rdkafka::{Message as _, message::OwnedMessage};
use serde::Serialize;

use super::{CAUSE, ERROR, KeptLetter, OMITTED, Place, TIME, header, origin, text_of};

/// How much of a value a person is shown.
const SHOWN_CHARS: usize = 300;

/// A dead letter as it is shown. What somebody else put into the topic says less.
#[derive(Debug, Serialize)]
pub struct DeadLetter {
    /// Where it lies in the topic, if it is there.
    #[serde(flatten)]
    pub place: Option<Place>,
    /// Its row, if there is one still.
    pub row: Option<i64>,
    /// When it died, RFC 3339.
    pub time: Option<String>,
    /// Why it died, in a word.
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
        DeadLetter {
            place: Some(Place::of(record)),
            row: None,
            time: header(record, TIME),
            cause: header(record, CAUSE),
            error: header(record, ERROR),
            origin: origin(record),
            key: text(record.key()),
            value: text(record.payload()),
            omitted: header(record, OMITTED),
        }
    }

    /// One that is not known to lie in the topic.
    pub fn kept(letter: &KeptLetter) -> DeadLetter {
        DeadLetter {
            place: None,
            row: Some(letter.id),
            time: Some(text_of(letter.dead_at)),
            cause: Some(letter.cause.clone()),
            error: Some(letter.error.clone()),
            origin: Some(letter.identity.place.clone()),
            key: text(letter.key.as_deref()),
            value: text(letter.value.as_deref()),
            omitted: None,
        }
    }
}

fn text(bytes: Option<&[u8]>) -> Option<String> {
    bytes.map(|bytes| String::from_utf8_lossy(bytes).into_owned())
}

impl fmt::Display for DeadLetter {
    /// Three lines, as `topic/partition/offset`: where it lies and comes from, what was wrong, what
    /// it says.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let known = |text: &Option<String>| shown(text.as_deref().unwrap_or("?"));
        let origin = self.origin.as_ref().map(Place::to_string);
        let lies = match (&self.place, self.row) {
            (Some(place), _) => place.to_string(),
            (None, Some(row)) => format!("row {row}"),
            (None, None) => "?".to_owned(),
        };
        writeln!(
            f,
            "{lies}  {}  {}  from {}  key {}",
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

/// Whoever writes to the topic must not write to an operator's terminal: control characters are
/// spelled out.
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
