//! How the partition of an order is chosen, written down in the database: as long as events wait,
//! it is not changed. Those that follow would go to another partition and could be read first.

use std::time::Duration;

use platform::{
    error::StartError,
    kafka::Partitioner,
    pg::{Database, Db},
};

use crate::store::outbox as store;

/// How long a start waits for a database that may be away; then the relay asks, before it sends
/// anything.
const ASKED_AT_START: Duration = Duration::from_secs(2);

/// Asks a database that can be asked at once.
///
/// # Errors
/// The partitioner was changed while events wait.
pub(crate) async fn settle_at_start(
    database: &Database,
    wanted: Partitioner,
) -> Result<(), StartError> {
    let asked = async {
        let mut db = database.connect_as("loms-start").await?;
        settle(&mut db, wanted).await
    };
    match tokio::time::timeout(ASKED_AT_START, asked).await {
        Ok(Err(error)) => error.downcast().map_or(Ok(()), Err),
        Ok(Ok(())) | Err(_) => Ok(()),
    }
}

/// Writes down what events are sent with from now on. Relays with another one get no lease after
/// that.
///
/// # Errors
/// [`StartError`] if it was another until now and events wait; the database's.
pub(super) async fn settle(db: &mut Db, wanted: Partitioner) -> anyhow::Result<()> {
    let mut tx = db.begin().await?;
    let (written, waiting) = store::lock_partitioner(&mut tx).await?;
    let known = Partitioner::default().as_str();
    let (before, wanted) = (written.as_deref().unwrap_or(known), wanted.as_str());
    if before != wanted && waiting {
        tx.rollback().await?;
        let changed = format!("kafka.partitioner was {before} and is {wanted}, and events wait");
        let undo = format!("write {before} until loms_outbox_rows is 0: docs/runbook.md");
        return Err(StartError::new(changed, undo).into());
    }
    if written.as_deref() != Some(wanted) {
        store::write_partitioner(&mut tx, wanted).await?;
    }
    tx.commit().await?;
    Ok(())
}
