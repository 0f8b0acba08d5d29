//! What the table knows of an event, and what that makes of the event: new, a duplicate, or in
//! conflict with another.

use time::OffsetDateTime;

use crate::{event::Event, saving::Verdict};

/// The row that has an event's sequence.
#[derive(Clone, Debug)]
pub struct Stored {
    /// Of the row.
    pub user: i64,
    /// Of the row.
    pub status: String,
    /// Of the row.
    pub message: String,
    /// Of the row.
    pub at: OffsetDateTime,
}

/// What the table knows of an event.
#[derive(Clone, Debug, Default)]
pub struct Known {
    /// The row of its order and sequence.
    pub taken: Option<Stored>,
    /// The sequence, or 0, of a row of its order, user and status.
    pub same: Option<i32>,
    /// Whose order it is: the event's user, if any row says so.
    pub owner: Option<i64>,
}

/// What becomes of an event, if that is decided by what is known of it: `None` for one that is new.
pub fn verdict(event: &Event, known: &Known) -> Option<Verdict> {
    let (order, user) = (event.order.get(), event.user.get());
    if let Some(stored) = &known.taken {
        return Some(if event.repeats(stored) {
            Verdict::Duplicate
        } else {
            Verdict::Conflict(format!(
                "order {order} has another event {} already: {:?} of user {}",
                event.sequence, stored.message, stored.user,
            ))
        });
    }
    match (known.same, known.owner) {
        (Some(sequence), _) if sequence > 0 && event.sequence > 0 => {
            Some(Verdict::Conflict(format!(
                "order {order} is {} already, by event {sequence}",
                event.status
            )))
        }
        (Some(_), _) => Some(Verdict::Duplicate),
        (None, Some(owner)) if owner != user => Some(Verdict::Conflict(format!(
            "order {order} is of user {owner} already"
        ))),
        (None, _) => None,
    }
}

impl Event {
    /// Whether this is the event of that row come again. Only what it carries itself is compared:
    /// Kafka's time and words of ours may differ from one delivery to the next.
    pub fn repeats(&self, stored: &Stored) -> bool {
        self.user.get() == stored.user
            && self.status.as_str() == stored.status
            && self
                .text
                .as_ref()
                .is_none_or(|text| *text == stored.message)
            && self.occurred_at.is_none_or(|at| at == stored.at)
    }
}

#[cfg(test)]
mod tests {
    use time::macros::datetime;

    use super::*;

    fn parse(json: &str) -> Event {
        Event::parse(Some(json.as_bytes())).expect("an event")
    }

    #[test]
    fn a_repeat_is_told_from_another_event_by_what_it_carries() {
        let stored = Stored {
            user: 7,
            status: "payed".to_owned(),
            message: "order 42 is payed".to_owned(),
            at: datetime!(2010-12-01 10:04:30 UTC),
        };
        for (json, same) in [
            (
                r#"{"UserId":7,"OrderID":42,"Status":"payed","Message":"order 42 is payed","OccurredAt":"2010-12-01T10:04:30Z"}"#,
                true,
            ),
            (r#"{"UserId":7,"OrderID":42,"Status":"payed"}"#, true),
            (r#"{"UserId":8,"OrderID":42,"Status":"payed"}"#, false),
            (r#"{"UserId":7,"OrderID":42,"Status":"new"}"#, false),
            (
                r#"{"UserId":7,"OrderID":42,"Status":"payed","Message":"other"}"#,
                false,
            ),
            (
                r#"{"UserId":7,"OrderID":42,"Status":"payed","OccurredAt":"2010-12-01T10:04:31Z"}"#,
                false,
            ),
        ] {
            assert_eq!(parse(json).repeats(&stored), same, "{json}");
        }
    }

    fn stored(user: i64) -> Option<Stored> {
        Some(Stored {
            user,
            status: "payed".to_owned(),
            message: "paid".to_owned(),
            at: datetime!(2026-03-01 10:00 UTC),
        })
    }

    #[test]
    fn what_is_known_decides() {
        let conflict = |text: &str| Some(Verdict::Conflict(text.to_owned()));
        let duplicate = Some(Verdict::Duplicate);
        let taken = "order 4 has another event 3 already: \"paid\" of user 8";
        for (sequence, row, same, owner, expected) in [
            (0, None, None, None, None),
            (3, None, None, None, None),
            (3, stored(7), Some(3), Some(7), duplicate.clone()),
            (3, stored(8), None, Some(8), conflict(taken)),
            // another text is the same event where one of the two has no sequence
            (0, None, Some(0), Some(7), duplicate.clone()),
            (0, None, Some(3), Some(7), duplicate.clone()),
            (3, None, Some(0), Some(7), duplicate),
            (
                3,
                None,
                Some(2),
                Some(7),
                conflict("order 4 is payed already, by event 2"),
            ),
            (0, None, None, Some(7), None),
            (
                0,
                None,
                None,
                Some(8),
                conflict("order 4 is of user 8 already"),
            ),
            (
                3,
                None,
                None,
                Some(8),
                conflict("order 4 is of user 8 already"),
            ),
        ] {
            let event = Event {
                sequence,
                ..Event::parse(Some(br#"{"UserId":7,"OrderID":4,"Status":"payed"}"#))
                    .expect("an event")
            };
            let known = Known {
                taken: row,
                same,
                owner,
            };
            assert_eq!(verdict(&event, &known), expected, "{known:?}");
        }
    }
}
