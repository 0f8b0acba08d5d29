//! What a user was told, day by day: the question checked, one indexed read, the answer in pages or whole. A page token is
//! the position of the last message given (keyset), so a page costs the same wherever it is.

use platform::{
    error::{Fields, Violation},
    pg::{Db, Pool},
};
use time::{Date, Month, OffsetDateTime, PrimitiveDateTime, Time};

use crate::{
    error::Error,
    event::UserId,
    message::{Position, Told},
    store,
};

/// The largest page (contract).
pub const MAX_PAGE: i32 = 1000;
/// What an old client, who knows no pages, gets at most (contract). More is an error, never a silent cut.
pub const MAX_WHOLE: i64 = 20_000;

/// A day as it is asked for, not yet known to exist.
#[derive(Clone, Copy, Debug)]
pub struct Day {
    /// 1 to 9999
    pub year: i32,
    /// 1 to 12
    pub month: i32,
    /// 1 to 31
    pub day: i32,
}

/// A checked question.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Query {
    /// Whose history.
    pub user: UserId,
    from: Date,
    to: Date,
    page: Page,
    after: Option<Position>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Page {
    Whole,
    Of(i32),
}

/// A page, or all there is.
#[derive(Clone, Debug)]
pub struct History {
    /// Ordered by (time, order, sequence).
    pub messages: Vec<Told>,
    /// For the next page; empty on the last.
    pub next_page_token: String,
}

impl Query {
    /// Checks a question; every violation is told at once.
    pub fn parse(
        user: i64,
        from: Option<Day>,
        to: Option<Day>,
        page_size: i32,
        page_token: &str,
    ) -> Result<Query, Vec<Violation>> {
        let mut fields = Fields::new();
        let user = UserId::new(user);
        fields.check(user.is_some(), "user", "must be positive");
        let from = date(from, "from", &mut fields);
        let to = date(to, "to", &mut fields);
        if let (Some(from), Some(to)) = (from, to) {
            fields.check(from <= to, "from", "must not be after to");
        }
        let page = match page_size {
            0 => Some(Page::Whole),
            1..=MAX_PAGE => Some(Page::Of(page_size)),
            _ => None,
        };
        fields.check(page.is_some(), "page_size", "must be 0 to 1000");
        let token = (!page_token.is_empty()).then(|| Token::parse(page_token));
        fields.check(
            !matches!(token, Some(None)),
            "page_token",
            "must be a next_page_token as it was given",
        );
        let token = token.flatten();
        match (user, from, to, page) {
            (Some(user), Some(from), Some(to), Some(page)) => {
                let after = token.map(|token| token.after);
                let query = Query {
                    user,
                    from,
                    to,
                    page,
                    after,
                };
                let ours = token.is_none_or(|token| token.belongs_to(&query));
                fields.check(
                    ours,
                    "page_token",
                    "must be sent with the user, from and to it was given for",
                );
                fields.finish().map(|()| query)
            }
            _ => Err(fields.finish().err().unwrap_or_default()),
        }
    }

    /// Whole days in UTC, both included: from the first midnight up to, not including, the one after the last.
    fn period(&self) -> (OffsetDateTime, OffsetDateTime) {
        let until = match self.to.next_day() {
            Some(next) => next.midnight(),
            None => PrimitiveDateTime::new(self.to, Time::MAX),
        };
        (self.from.midnight().assume_utc(), until.assume_utc())
    }
}

fn date(day: Option<Day>, field: &'static str, fields: &mut Fields) -> Option<Date> {
    let Some(Day { year, month, day }) = day else {
        fields.push(field, "must be set");
        return None;
    };
    let exists = || {
        let month = Month::try_from(u8::try_from(month).ok()?).ok()?;
        let day = u8::try_from(day).ok()?;
        (1..=9999).contains(&year).then_some(())?;
        Date::from_calendar_date(year, month, day).ok()
    };
    let date = exists();
    fields.check(
        date.is_some(),
        field,
        "must be a date that exists, in the years 1 to 9999",
    );
    date
}

/// A position and the question it belongs to: a token from another question would skip or repeat messages unnoticed.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Token {
    user: i64,
    from: i32,
    to: i32,
    after: Position,
}

impl Token {
    fn new(query: &Query, after: Position) -> Token {
        Token {
            user: query.user.get(),
            from: query.from.to_julian_day(),
            to: query.to.to_julian_day(),
            after,
        }
    }

    fn belongs_to(&self, query: &Query) -> bool {
        let (from, until) = query.period();
        let within = store::time_of(self.after.micros).is_some_and(|at| from <= at && at < until);
        within && *self == Token::new(query, self.after)
    }

    fn write(&self) -> String {
        let Position {
            micros,
            order,
            sequence,
            id,
        } = self.after;
        format!(
            "{}.{}.{}.{micros}.{order}.{sequence}.{id}",
            self.user, self.from, self.to
        )
    }

    fn parse(text: &str) -> Option<Token> {
        let mut parts = text.split('.');
        let token = Token {
            user: parts.next()?.parse().ok()?,
            from: parts.next()?.parse().ok()?,
            to: parts.next()?.parse().ok()?,
            after: Position {
                micros: parts.next()?.parse().ok()?,
                order: parts.next()?.parse().ok()?,
                sequence: parts.next()?.parse().ok()?,
                id: parts.next()?.parse().ok()?,
            },
        };
        parts.next().is_none().then_some(token)
    }
}

/// Answers a question from the table: always fresh, no cache.
pub async fn get(pool: &Pool, query: &Query) -> Result<History, Error> {
    let (from, until) = query.period();
    let limit = match query.page {
        Page::Whole => MAX_WHOLE,
        Page::Of(size) => i64::from(size),
    };
    // one more than is given shows whether there is more
    let read = async |db: &mut Db| {
        store::read_history(db, query.user, from, until, query.after, limit + 1).await
    };
    let mut messages = pool.repeatable(read).await?;
    let more = messages.len() as i64 > limit;
    if !more {
        return Ok(History {
            messages,
            next_page_token: String::new(),
        });
    }
    let Page::Of(size) = query.page else {
        return Err(Error::HistoryTooLong { limit: MAX_WHOLE });
    };
    messages.truncate(size as usize);
    let next_page_token = messages
        .last()
        .map(|last| Token::new(query, last.position).write())
        .unwrap_or_default();
    Ok(History {
        messages,
        next_page_token,
    })
}

#[cfg(test)]
mod tests {
    use time::macros::datetime;

    use super::*;

    fn day(year: i32, month: i32, day: i32) -> Option<Day> {
        Some(Day { year, month, day })
    }

    fn fields(result: Result<Query, Vec<Violation>>) -> Vec<String> {
        result
            .expect_err("refused")
            .into_iter()
            .map(|violation| violation.field)
            .collect()
    }

    #[test]
    fn days_are_whole_and_both_included() {
        let query = Query::parse(1, day(2024, 2, 28), day(2024, 2, 29), 0, "").expect("a query");
        assert_eq!(
            query.period(),
            (
                datetime!(2024-02-28 0:00 UTC),
                datetime!(2024-03-01 0:00 UTC)
            )
        );
        let last = Query::parse(1, day(9999, 12, 31), day(9999, 12, 31), 0, "").expect("a query");
        assert_eq!(last.period().0, datetime!(9999-12-31 0:00 UTC));
        assert!(last.period().1 > datetime!(9999-12-31 23:59:59 UTC));
    }

    #[test]
    fn everything_wrong_is_told_at_once() {
        let wrong = Query::parse(0, day(2023, 2, 29), None, 1001, "x");
        assert_eq!(
            fields(wrong),
            ["user", "from", "to", "page_size", "page_token"]
        );
        assert_eq!(
            fields(Query::parse(-1, day(2024, 1, 2), day(2024, 1, 1), -1, "")),
            ["user", "from", "page_size"]
        );
    }

    #[test]
    fn dates_that_do_not_exist() {
        for (year, month, number) in [
            (0, 1, 1),
            (10_000, 1, 1),
            (-5, 1, 1),
            (2024, 0, 1),
            (2024, 13, 1),
            (2024, 1, 0),
            (2024, 4, 31),
            (2023, 2, 29),
            (2024, -1, 1),
            (2024, 257, 1),
            (2024, 1, 257),
            (i32::MAX, i32::MAX, i32::MAX),
            (i32::MIN, 0, 0),
        ] {
            let query = Query::parse(1, day(year, month, number), day(9999, 12, 31), 0, "");
            assert_eq!(fields(query), ["from"], "{year}-{month}-{number}");
        }
    }

    #[test]
    fn a_token_is_read_back_only_for_its_own_question() {
        let query = Query::parse(7, day(2024, 1, 1), day(2024, 1, 31), 2, "").expect("a query");
        let after = Position {
            micros: 1_704_103_200_250_000,
            order: 42,
            sequence: 2,
            id: 9,
        };
        let token = Token::new(&query, after).write();
        let next =
            Query::parse(7, day(2024, 1, 1), day(2024, 1, 31), 3, &token).expect("the next page");
        assert_eq!(next.after, Some(after));
        assert_eq!(
            fields(Query::parse(
                8,
                day(2024, 1, 1),
                day(2024, 1, 31),
                2,
                &token
            )),
            ["page_token"]
        );
        assert_eq!(
            fields(Query::parse(
                7,
                day(2024, 1, 2),
                day(2024, 1, 31),
                2,
                &token
            )),
            ["page_token"]
        );
        for bad in [
            "x",
            "1.2.3",
            &format!("{token}.1"),
            &format!("{token}x"),
            &token.replace("1704103200250000", &i64::MAX.to_string()),
        ] {
            assert_eq!(
                fields(Query::parse(7, day(2024, 1, 1), day(2024, 1, 31), 2, bad)),
                ["page_token"],
                "{bad}"
            );
        }
    }
}
