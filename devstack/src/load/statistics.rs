//! Where PostgreSQL's time goes during a load, by `pg_stat_statements`.

use std::{fmt::Write as _, time::Duration};

use anyhow::{Context as _, Result};
use serde::Serialize;
use sqlx::{PgConnection, Row as _};

use super::statements::Catalogue;

/// A session takes a new setting when it is next idle, which is a moment for those that are busy.
const SETTLED: Duration = Duration::from_millis(300);
/// The statements that are told of.
const TOLD: usize = 20;

/// What one statement took; times in milliseconds and pages of 8 KiB are of one call.
#[derive(Debug, Clone, Serialize)]
pub(super) struct Cost {
    name: String,
    /// Of the time that all statements took.
    share: f64,
    calls: i64,
    /// Of the calls, those that were planned anew.
    planned: i64,
    ms: f64,
    rows: f64,
    pages_in_memory: f64,
    pages_read: f64,
    wal_bytes: f64,
}

/// Counts from now on.
pub(super) async fn start(db: &mut PgConnection) -> Result<()> {
    run(db, "CREATE EXTENSION IF NOT EXISTS pg_stat_statements").await?;
    run(db, "ALTER SYSTEM SET pg_stat_statements.track = 'top'").await?;
    run(
        db,
        "ALTER SYSTEM SET pg_stat_statements.track_planning = on",
    )
    .await?;
    take_effect(db).await?;
    run(db, "SELECT pg_stat_statements_reset()").await
}

/// Ends the counting, and says what there was.
pub(super) async fn finish(db: &mut PgConnection) -> Result<Vec<Cost>> {
    let rows = sqlx::query(
        "SELECT query, calls, plans, total_exec_time + total_plan_time AS ms, rows, shared_blks_hit, shared_blks_read,
                wal_bytes::float8 AS wal
         FROM pg_stat_statements WHERE dbid = (SELECT oid FROM pg_database WHERE datname = current_database()) AND calls > 0
         ORDER BY ms DESC",
    )
    .fetch_all(&mut *db)
    .await?;
    run(db, "ALTER SYSTEM RESET pg_stat_statements.track").await?;
    run(db, "ALTER SYSTEM RESET pg_stat_statements.track_planning").await?;
    take_effect(db).await?;
    let catalogue = Catalogue::read()?;
    let mut all = 0.0;
    for row in &rows {
        all += row.try_get::<f64, _>("ms")?;
    }
    let told = rows.iter().take(TOLD);
    told.map(|row| {
        let text: &str = row.try_get("query")?;
        let calls: i64 = row.try_get("calls")?;
        let ms: f64 = row.try_get("ms")?;
        let each = |name| anyhow::Ok(row.try_get::<i64, _>(name)? as f64 / calls as f64);
        Ok(Cost {
            name: catalogue
                .named_without_constants(text)
                .unwrap_or_else(|| beginning(text)),
            share: ms / all,
            calls,
            planned: row.try_get("plans")?,
            ms: ms / calls as f64,
            rows: each("rows")?,
            pages_in_memory: each("shared_blks_hit")?,
            pages_read: each("shared_blks_read")?,
            wal_bytes: row.try_get::<f64, _>("wal")? / calls as f64,
        })
    })
    .collect()
}

/// The statements that are not of the store: BEGIN, COMMIT, those of the load itself.
fn beginning(text: &str) -> String {
    let words: Vec<_> = text.split_whitespace().collect();
    words.join(" ").chars().take(60).collect()
}

/// One at a time: ALTER SYSTEM stands in no transaction.
pub(super) async fn run(db: &mut PgConnection, statement: &'static str) -> Result<()> {
    let done = sqlx::query(statement).execute(db).await;
    done.with_context(|| format!("{statement} (devstack's own PostgreSQL has what this needs)"))?;
    Ok(())
}

/// Lets every session have the settings that were changed.
pub(super) async fn take_effect(db: &mut PgConnection) -> Result<()> {
    run(db, "SELECT pg_reload_conf()").await?;
    tokio::time::sleep(SETTLED).await;
    Ok(())
}

/// For people, and for a page.
pub(super) fn table(costs: &[Cost]) -> String {
    let mut text =
        "| statement | share | calls | planned | ms | rows | pages in memory | read | WAL bytes |\n\
                    |---|---|---|---|---|---|---|---|---|\n"
            .to_owned();
    for cost in costs {
        let _ = writeln!(
            text,
            "| {} | {:.1} % | {} | {} | {:.3} | {:.1} | {:.1} | {:.2} | {:.0} |",
            cost.name,
            cost.share * 100.0,
            cost.calls,
            cost.planned,
            cost.ms,
            cost.rows,
            cost.pages_in_memory,
            cost.pages_read,
            cost.wal_bytes
        );
    }
    text
}
