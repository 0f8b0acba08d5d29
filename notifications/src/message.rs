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
    /// Whose order.
    pub user: i64,
    /// What it has become.
    pub status: String,
    /// How often it failed.
    pub attempts: i32,
    /// What it failed with last.
    pub last_error: Option<String>,
    /// The trace context of the event's publisher.
    pub traceparent: Option<String>,
    /// Too old to be told.
    pub overdue: bool,
}

/// What the history keeps: the publisher's words, or ours where it has none.
pub fn words(event: &Event) -> String {
    match &event.text {
        Some(text) => text.clone(),
        None => text(event.order.get(), event.user.get(), event.status.as_str()),
    }
}

impl Due {
    /// What people read. One chat serves all, and publishers may name neither order nor user: it
    /// says whose order it is, whatever the publisher's words are.
    pub fn text(&self) -> String {
        text(self.order, self.user, &self.status)
    }
}

fn text(order: i64, user: i64, status: &str) -> String {
    let known = Status::ALL
        .into_iter()
        .find(|known| known.as_str() == status);
    let next = known.map_or("its status has changed.", next);
    format!("Order {order} of user {user} is {status}: {next}")
}

/// What happens next, or what a user is to do.
fn next(status: Status) -> &'static str {
    match status {
        Status::New => "its goods are being reserved.",
        Status::AwaitingPayment => "its goods are reserved. Please pay for it before its deadline.",
        Status::Failed => "some of its goods are out of stock. Nothing is due.",
        Status::Payed => "its goods are being prepared.",
        Status::Cancelled => "its goods are back on sale and nothing is due.",
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
            let text = words(&event);
            let begins = format!("Order 4711 of user 1 is {status}: ");
            assert!(text.starts_with(&begins) && text.ends_with('.'), "{text}");
        }
    }

    #[test]
    fn the_publishers_words_are_kept() {
        let json = br#"{"UserId":1,"OrderID":2,"Status":"payed","Message":"Order 2 is paid."}"#;
        let event = Event::parse(Some(json)).expect("an event");
        assert_eq!(words(&event), "Order 2 is paid.");
    }
}
