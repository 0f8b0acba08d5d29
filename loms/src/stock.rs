//! What is on sale, and deliveries: all lines or none, and the same delivery once.

use std::{path::Path, time::Duration};

use anyhow::Context as _;
use platform::{
    command::{self, Access},
    pg::{Database, Db, Pool},
};
use serde::Deserialize;
use sha2::{Digest as _, Sha256};

use crate::{
    config::Config,
    crash::CrashPoint,
    delivery::Delivery,
    error::Error,
    order::{Sku, WarehouseId},
    store::stock as store,
};

/// Units on sale by warehouse.
pub(crate) async fn on_sale(pool: &Pool, sku: Sku) -> Result<Vec<(WarehouseId, u64)>, Error> {
    let read = async |db: &mut Db| store::read_stock(db, sku).await;
    Ok(pool.repeatable(read).await?)
}

/// Books a delivery for whom the log names. `true`: it was booked before, nothing happened now.
pub(crate) async fn receive(
    pool: &Pool,
    delivery: &Delivery,
    booked_by: &str,
) -> Result<bool, Error> {
    pool.with_connection(async |db| book(db, delivery, booked_by).await)
        .await
}

async fn book(db: &mut Db, delivery: &Delivery, booked_by: &str) -> Result<bool, Error> {
    let mut tx = db.begin().await?;
    if !store::claim_delivery(&mut tx, delivery).await? {
        let known = store::read_delivery_hash(&mut tx, delivery.id()).await?;
        return if known == delivery.content_hash() {
            Ok(true)
        } else {
            Err(Error::DeliveryReused)
        };
    }
    store::insert_delivery_lines(&mut tx, delivery).await?;
    CrashPoint::StockReceiving.pass();
    tx.commit().await?;
    CrashPoint::StockReceived.pass();
    tracing::info!(
        delivery.id = %delivery.id(), delivery.units = delivery.units(), delivery.booked_by = booked_by,
        "delivery received"
    );
    Ok(false)
}

#[derive(Deserialize)]
struct Row {
    warehouse_id: i64,
    sku: u32,
    count: u64,
}

/// `loms stock receive FILE`: books a CSV file with the header `warehouse_id,sku,count`. Without an id the delivery is
/// named after the file's name and content, so that the same file is received once. Returns what to print.
///
/// # Errors
/// A file or line that cannot be read, or a delivery that is refused.
pub async fn receive_file(
    config: &Config,
    file: &Path,
    delivery_id: Option<String>,
    wait: Duration,
) -> anyhow::Result<String> {
    let text = std::fs::read(file).with_context(|| format!("reading {}", file.display()))?;
    let rows = read_rows(&text).with_context(|| format!("reading {}", file.display()))?;
    let id = delivery_id.unwrap_or_else(|| {
        let name = file
            .file_name()
            .map(|name| name.to_string_lossy().into_owned())
            .unwrap_or_default();
        let name: String = name
            .chars()
            .filter(|c| (' '..='~').contains(c))
            .take(90)
            .collect();
        format!("{name}-{:.16}", format!("{:x}", Sha256::digest(&text)))
    });
    let lines = rows
        .iter()
        .map(|(_, row)| (row.warehouse_id, row.sku, row.count));
    let delivery = Delivery::parse(&id, lines, |index| format!("line {}", rows[index].0)).map_err(
        |violations| {
            let all: Vec<_> = violations
                .iter()
                .map(|v| format!("{} {}", v.field, v.description))
                .collect();
            anyhow::anyhow!("{}: {}", file.display(), all.join("; "))
        },
    )?;
    command::wait_for_database(&config.postgres, "loms-stock", Access::Write, wait).await?;
    let pool = Database::of_any_schema("loms", &config.postgres)?.pool("loms-stock", 1);
    let again = receive(&pool, &delivery, "cli")
        .await
        .map_err(crate::error::explain)?;
    let (lines, units) = (delivery.lines().len(), delivery.units());
    Ok(if again {
        format!("delivery {id} had been received before: nothing changed")
    } else {
        format!("delivery {id} received: {units} units in {lines} lines")
    })
}

/// The rows of a CSV file, each with the number of its line.
fn read_rows(text: &[u8]) -> anyhow::Result<Vec<(u64, Row)>> {
    let mut reader = csv::Reader::from_reader(text);
    let header = reader.headers()?.clone();
    let mut rows = Vec::new();
    for record in reader.records() {
        let row = record.and_then(|record| {
            let row: Row = record.deserialize(Some(&header))?;
            Ok((line_of(text, record.position()), row))
        });
        rows.push(row.map_err(|error| {
            let cause = match error.kind() {
                csv::ErrorKind::Deserialize { err, .. } => err.to_string(),
                csv::ErrorKind::UnequalLengths {
                    expected_len, len, ..
                } => format!("has {len} fields, the header has {expected_len}"),
                _ => error.to_string(),
            };
            anyhow::anyhow!("line {}: {cause}", line_of(text, error.position()))
        })?);
    }
    Ok(rows)
}

/// The reader's position is where the record before has ended: blank lines follow, and the second half of a CRLF.
fn line_of(text: &[u8], position: Option<&csv::Position>) -> u64 {
    let Some(position) = position else { return 0 };
    let from = usize::try_from(position.byte()).unwrap_or(text.len());
    let between = text.iter().skip(from);
    let skipped = between
        .take_while(|byte| matches!(byte, b'\r' | b'\n'))
        .filter(|byte| **byte == b'\n')
        .count();
    position.line() + skipped as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_know_their_lines() {
        let lines = |text: &str| -> Vec<u64> {
            let rows = read_rows(text.as_bytes()).unwrap();
            rows.into_iter().map(|(line, _)| line).collect()
        };
        assert_eq!(lines("warehouse_id,sku,count\n1,1,1\n1,1,1"), [2, 3]);
        assert_eq!(
            lines("\nwarehouse_id,sku,count\n\n1,1,1\n\n\n1,1,1\n"),
            [4, 7]
        );
        assert_eq!(
            lines("warehouse_id,sku,count\r\n1,1,1\r\n\r\n1,1,1\r\n"),
            [2, 4]
        );
        let wrong = |text: &str| read_rows(text.as_bytes()).err().unwrap().to_string();
        assert!(wrong("warehouse_id,sku,count\r\n1,1,1\r\n1,1\r\n").starts_with("line 3: has 2"));
        assert!(wrong("warehouse_id,sku,count\r\n1,1,1\r\n1,x,1\r\n").starts_with("line 3: "));
    }
}
