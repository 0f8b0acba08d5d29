//! What people read: the words of an event in the history, what is told of it, and the messages as they are kept.

use crate::event::{Event, Status};

/// Where a message stands in its user's history.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Position {
    /// When it happened, microseconds since 1970.
    pub micros: i64,
    /// Of which order.
    pub order: i64,
    /// Its place within the order.
    pub sequence: i32,
    /// Its row.
    pub id: i64,
}

/// One message of the history.
#[derive(Clone, Debug)]
pub struct Told {
    /// Where it stands.
    pub position: Position,
    /// The status the order came to.
    pub status: String,
    /// The words.
    pub message: String,
}

/// A message that is to be told now.
#[derive(Clone, Debug)]
pub struct Due {
    /// Its row.
    pub id: i64,
    /// Of which order.
    pub order: i64,
    /// The words.
    pub message: String,
    /// How often it failed.
    pub attempts: i32,
    /// What it failed with last.
    pub last_error: Option<String>,
    /// The trace context of the event's publisher.
    pub traceparent: Option<String>,
    /// Too old to be told.
    pub overdue: bool,
}

/// What is kept and told: the publisher's words, which say what happened and what next, else our own.
pub fn words(event: &Event) -> String {
    match &event.text {
        Some(text) => text.clone(),
        None => format!("Order {}: {}", event.order.get(), told(event.status)),
    }
}

fn told(status: Status) -> &'static str {
    match status {
        Status::New => "we have received it and are reserving its goods.",
        Status::AwaitingPayment => "its goods are reserved. Please pay for it before its deadline.",
        Status::Failed => "some of its goods are out of stock. Nothing is due.",
        Status::Payed => "your payment has arrived. We are preparing it.",
        Status::Cancelled => "it is cancelled. Its goods are back on sale and nothing is due.",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_event_without_words_is_told_with_its_order() {
        for status in Status::ALL {
            let json =
                format!(r#"{{"UserId":1,"OrderID":4711,"Status":"{status}","Message":" "}}"#);
            let event = Event::parse(Some(json.as_bytes())).expect("an event");
            assert_eq!(event.status, status);
            assert_eq!(words(&event), format!("Order 4711: {}", told(status)));
        }
    }

    #[test]
    fn the_publishers_words_are_kept() {
        let json = br#"{"UserId":1,"OrderID":2,"Status":"payed","Message":"Order 2 is paid."}"#;
        let event = Event::parse(Some(json)).expect("an event");
        assert_eq!(words(&event), "Order 2 is paid.");
    }
}
