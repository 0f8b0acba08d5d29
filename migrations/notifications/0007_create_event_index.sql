-- no-transaction
-- What keeps an event from being saved twice, with or without a sequence. The user comes last: questions name order and
-- status only, so that no other index, of a user say, looks as good while the table is small.
CREATE UNIQUE INDEX CONCURRENTLY message_event_unique ON notifications.message (order_id, status, user_id)
    WHERE superseded IS FALSE;
