-- A CHECK that comes to NULL passes, and `from_status = 'new'` is NULL where from_status is: a second or third step from
-- nowhere was let in. IS TRUE makes NULL a refusal. No release has written such a row; the check reads the table once.
ALTER TABLE loms.status_change
    DROP CONSTRAINT status_change_legal,
    ADD CONSTRAINT status_change_legal CHECK ((
           (sequence = 1 AND from_status IS NULL AND to_status = 'new')
        OR (sequence = 2 AND from_status = 'new' AND to_status IN ('awaiting payment', 'failed'))
        OR (sequence = 3 AND from_status = 'awaiting payment' AND to_status IN ('payed', 'cancelled'))
    ) IS TRUE);
