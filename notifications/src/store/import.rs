//! What `notifications import` reads from the table of the system before, whose types it does not
//! know, and what it writes.

use platform::{import::Source, pg::Db};
use sqlx::AssertSqlSafe;
use time::OffsetDateTime;

use crate::import::OldMessage;

type Columns = (i64, i64, i64, String, String, Option<OffsetDateTime>);

/// The next messages with numbers above `after`, of one moment.
pub(crate) async fn read_messages(
    source: &mut Source,
    after: Option<i64>,
) -> anyhow::Result<Vec<OldMessage>> {
    // text of a fixed length is filled up with spaces, which the cast takes off
    let statement = format!(
        "SELECT id::bigint, coalesce(user_id, 0)::bigint, coalesce(order_id, 0)::bigint, coalesce(status::text, ''),
                coalesce(message::text, ''), {}
         FROM public.message WHERE $1::bigint IS NULL OR id > $1 ORDER BY id LIMIT $2",
        source.time_of("message", "created_date")
    );
    let limit = source.slice();
    let mut tx = source.snapshot().await?;
    let rows: Vec<Columns> = sqlx::query_as(AssertSqlSafe(statement))
        .bind(after)
        .bind(limit)
        .fetch_all(&mut *tx)
        .await?;
    tx.rollback().await?;
    let messages = rows.into_iter();
    let messages = messages.map(|(id, user, order, status, message, at)| OldMessage {
        id,
        user,
        order,
        status,
        message,
        at,
    });
    Ok(messages.collect())
}

/// Whether there are messages already.
pub(crate) async fn has_messages(db: &mut Db) -> sqlx::Result<bool> {
    sqlx::query_scalar!(r#"SELECT EXISTS (SELECT FROM notifications.message) AS "there!""#)
        .fetch_one(db)
        .await
}

/// No message gets a number that the system before has given.
pub(crate) async fn raise_message_numbers(db: &mut Db, highest: i64) -> sqlx::Result<()> {
    sqlx::query!(
        r#"SELECT setval('notifications.message_id_seq', greatest($1, last_value)) FROM notifications.message_id_seq
           WHERE $1::bigint > 0"#,
        highest
    )
    .fetch_optional(db)
    .await?;
    Ok(())
}

/// Writes messages as told, each with the number and the time that it has, as read from `source`,
/// which is no topic. Of several of one event the first one counts.
pub(crate) async fn insert_messages(
    db: &mut Db,
    source: &str,
    messages: &[&OldMessage],
) -> sqlx::Result<()> {
    let ids: Vec<i64> = messages.iter().map(|message| message.id).collect();
    let users: Vec<i64> = messages.iter().map(|message| message.user).collect();
    let orders: Vec<i64> = messages.iter().map(|message| message.order).collect();
    let statuses: Vec<&str> = messages.iter().map(|m| m.status.as_str()).collect();
    let words: Vec<&str> = messages.iter().map(|m| m.message.as_str()).collect();
    let times: Vec<_> = messages.iter().map(|message| message.at).collect();
    sqlx::query!(
        r#"
        INSERT INTO notifications.message
            (id, user_id, order_id, sequence, status, message, created_at, told_at,
             source_topic, source_partition, source_offset, superseded)
        OVERRIDING SYSTEM VALUE
        SELECT g.id, g.user_id, g.order_id, 0, g.status, g.message, g.at, g.at, $1, 0, g.id,
               row_number() OVER (PARTITION BY g.order_id, g.status, g.user_id ORDER BY g.id) > 1
               OR EXISTS (SELECT FROM notifications.message AS m
                          WHERE m.order_id = g.order_id AND m.status = g.status AND m.user_id = g.user_id
                            AND m.superseded IS FALSE)
        FROM UNNEST($2::bigint[], $3::bigint[], $4::bigint[], $5::text[], $6::text[], $7::timestamptz[])
             AS g (id, user_id, order_id, status, message, at)
        ORDER BY g.id
        "#,
        source,
        &ids,
        &users,
        &orders,
        &statuses as &[&str],
        &words as &[&str],
        &times as &[Option<OffsetDateTime>],
    )
    .execute(db)
    .await?;
    Ok(())
}

/// Calls are planned for a table that is no longer empty.
pub(crate) async fn analyze(db: &mut Db) -> sqlx::Result<()> {
    sqlx::query!("ANALYZE notifications.message")
        .execute(db)
        .await?;
    Ok(())
}
