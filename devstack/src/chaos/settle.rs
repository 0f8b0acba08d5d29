//! Rest: after the last fault everything that was left open must finish by itself. Then every key is asked again, because a
//! key that has an answer must keep it.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use rand::{SeedableRng as _, rngs::StdRng};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use super::{
    buyers::place,
    calls::{Caller, Ledger},
    facts::{Lines, PurchaseFact},
    log::Topics,
    shoppers::purchase,
    snapshot::rows,
};
use crate::{postgres::connect, stack::Stack};

const LOOK: Duration = Duration::from_millis(250);
/// Who asks again, at once.
const ASKERS: usize = 16;
/// For one key to be answered by a system at rest.
const ANSWER_BOUND: Duration = Duration::from_secs(20);

/// Waits until nothing is under way any more; what still is after `bound` is answered.
pub(super) async fn settle(stack: &Stack, bound: Duration) -> Result<Vec<String>> {
    let by = Instant::now() + bound;
    loop {
        let open = under_way(stack).await?;
        if open.is_empty() || Instant::now() > by {
            return Ok(open);
        }
        tokio::time::sleep(LOOK).await;
    }
}

async fn under_way(stack: &Stack) -> Result<Vec<String>> {
    let mut open = Vec::new();
    let mut note = |what: &str, count: i64| {
        if count != 0 {
            open.push(format!("{what}: {count}"));
        }
    };
    let open_purchases = "SELECT count(*) FROM checkout.purchase WHERE closed_at IS NULL";
    note(
        "open purchases",
        count(stack, "checkout", open_purchases).await?,
    );
    let unpaid = "SELECT count(*) FROM loms.unpaid_order";
    note("unpaid orders", count(stack, "loms", unpaid).await?);
    let waiting = "SELECT count(*) FROM loms.outbox";
    note("events in the outbox", count(stack, "loms", waiting).await?);
    let changes = count(stack, "loms", "SELECT count(*) FROM loms.status_change").await?;
    let saved = "SELECT count(*) FROM notifications.message";
    let saved = count(stack, "notifications", saved).await?;
    note("events not in Notifications", changes - saved);
    let untold =
        "SELECT count(*) FROM notifications.message WHERE told_at IS NULL AND given_up_at IS NULL";
    note(
        "untold messages",
        count(stack, "notifications", untold).await?,
    );
    match Topics::of(stack).lag().await {
        Ok(lag) => note("consumer lag", lag),
        // one that has just come back is still electing leaders
        Err(error) => open.push(format!("the broker does not answer: {error:#}")),
    }
    Ok(open)
}

async fn count(stack: &Stack, service: &str, statement: &'static str) -> Result<i64> {
    let mut db = connect(stack.database(service)?).await?;
    let found: Vec<(i64,)> = rows(&mut db, statement).await?;
    Ok(found.iter().map(|(count,)| count).sum())
}

/// A request with a key that may be asked again.
enum Again {
    Order(i64, String, Lines),
    Purchase(i64, String),
}

/// Asks every key again; another answer than before is a contradiction. Answers how many.
pub(super) async fn ask_again(stack: &Stack, ledger: &Arc<Ledger>) -> Result<usize> {
    let mut all: Vec<Again> = Vec::new();
    {
        let facts = ledger.facts();
        let orders = facts.orders.iter().filter(|(_, fact)| fact.order.is_some());
        all.extend(orders.filter_map(|(user, fact)| {
            let key = fact.key.clone()?;
            Some(Again::Order(*user, key, fact.lines.clone()))
        }));
        let ended = |fact: &PurchaseFact| fact.order().is_some();
        let purchases = facts.purchases.iter().filter(|(_, fact)| ended(fact));
        all.extend(purchases.map(|((user, key), _)| Again::Purchase(*user, key.clone())));
    }
    let keys = all.len();
    let closed = CancellationToken::new();
    let mut askers = JoinSet::new();
    for number in 0..ASKERS {
        let share: Vec<_> = all.drain(..all.len().div_ceil(ASKERS - number)).collect();
        let mut caller = Caller {
            clients: stack.clients()?,
            ledger: ledger.clone(),
            random: StdRng::seed_from_u64(number as u64),
            closing: CancellationToken::new(),
            closed: closed.clone(),
            impatience: 0,
        };
        askers.spawn(async move {
            for again in share {
                match again {
                    Again::Order(user, key, lines) => {
                        place(&mut caller, user, Some(key), &lines).await;
                    }
                    Again::Purchase(user, key) => {
                        purchase(&mut caller, user, &key).await;
                    }
                }
            }
        });
    }
    let bound = ANSWER_BOUND + Duration::from_millis(20) * u32::try_from(keys)?;
    let asking = tokio::time::timeout(bound, async {
        while let Some(asker) = askers.join_next().await {
            asker.context("an asker panicked")?;
        }
        anyhow::Ok(())
    });
    asking.await.context("a system at rest does not answer")??;
    Ok(keys)
}
