-- Of several rows of one event one counts: one that was told, else one that will be, else the first. The others stay, and
-- what of them is untold is not told again. Only such rows are locked and written; the release before goes on beside this.
UPDATE notifications.message AS m
SET superseded = true,
    given_up_at = CASE WHEN num_nulls(m.told_at, m.given_up_at) = 2 THEN now() ELSE m.given_up_at END,
    give_up_reason = CASE WHEN num_nulls(m.told_at, m.given_up_at) = 2 THEN 'superseded' ELSE m.give_up_reason END
FROM (
    SELECT id, row_number() OVER (
        PARTITION BY order_id, user_id, status
        ORDER BY told_at IS NULL, given_up_at IS NOT NULL, sequence = 0, id) AS nth
    FROM notifications.message) AS ranked
WHERE ranked.id = m.id AND ranked.nth > 1;
