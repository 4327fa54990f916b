-- Every limit of a call, the vendor's gate and the breaker, in one step on the server's clock.
--
-- All keys share the slot of the hash tag {limits}, since a call takes its provider's, its
-- tenant's and its key's limits at once or none.
--
-- key                                type    what                                       lives
-- {limits}:since                     string  which run of Redis remembers since when    for ever
-- {limits}:meter:<limit>[:<who>]     hash    state   packed, see STATE                  window
--                                            <n>     used in the n-th 120th of the window
--                                    zset    calls at once: attempt -> its lease's end  leases
-- {limits}:seeding:<limit>[:<who>]   string  the attempt that reads Postgres for it         seconds
-- {limits}:gate:<place>              string  closed until (us)                          until then
-- {limits}:circuit:<place>           string  packed, see BREAKER; none where closed     an hour
-- {limits}:health:<place>            hash    c<n> calls, f<n> faults of the n-th 5 s    a minute
-- {limits}:probes:<place>            zset    half-open: attempt -> its lease's end      leases
-- {limits}:learnt:<place>            string  packed, see LEARNT                         a week
-- {limits}:tries:<provider>          hash    c<n> calls, x<n> again of the n-th 10 s    a minute
-- {limits}:errors                    hash    <place> <error class> -> count             for ever
-- {limits}:retries                   hash    the same, of those that are tried again    for ever
-- {limits}:taken:<attempt>           string  granted at (us)                            the call
--
-- <place> is <provider>/<model>. Times are microseconds of the server's clock.
--
-- A rate has two meters. The bucket (GCRA) spreads the window's amount evenly, with a burst. The
-- slots count what was used in any window: never more than the amount, whatever was estimated,
-- settled or used in bursts. `docs/decisions/0015-two-meters-for-a-rate.md` says why.
--
-- It is a library of one function, whose first line (`#!lua name=…`) and NAME `meters.py` writes.
-- Its arguments: the operation, what it is given as JSON, and the meters as `Rule.wire` packs them.
-- It answers JSON, or JSON and numbers that are packed. A number that nobody knows is NONE.
--
-- Between two calls the server's caches are cold: what a command costs is mostly that it is another
-- one. So what is read together is one key, or keys of one MGET.

local SLOTS = 120
local BREAKER_SLOT, BREAKER_SLOTS, BREAKER_LEAST = 5e6, 6, 20
local COOLDOWN, COOLDOWN_MOST = 10e6, 120e6
local HEALTH, TRIES = { 'c', 'f' }, { 'c', 'x' }
local PROBES, PROBES_TO_CLOSE = 3, 2
local TRIES_SLOT, TRIES_SLOTS, TRIES_LEAST, TRIES_SHARE = 10e6, 6, 10, 0.2
local WEEK_MS, HOUR_MS, SEEDING_MS = 604800000, 3600000, 10000
-- What is left for a waiting call is left until it can have asked again.
local CLAIM_SHARE, CLAIM_US = 1.2, 200000
local NONE = -1

-- Of the call: what it was given, and when.
local keys, args, packed, now
-- The id of this run of the server: it has another after each start.
local run

local function epoch(kept)
  -- Since when it remembers (us). What it read from its disk, or from a server that it replaces, may
  -- be old: that was kept by another run.
  run = run or string.match(redis.call('INFO', 'server'), 'run_id:(%x+)')
  local since = kept and string.sub(kept, 1, #run) == run and tonumber(string.sub(kept, #run + 2))
  if since and since <= now then return since end
  redis.call('SET', '{limits}:since', string.format('%s %.0f', run, now))
  return now
end

local operations = {}

-- A rate's meter ----------------------------------------------------------------------------------

-- m: need (reserved), pace (expected), used, told_limit and told_left (as the vendor's headers say,
--    or -1), amount, burst, keep (what background work leaves), per (the window, us; 0 for calls at
--    once), slack (slots), seeds (Postgres knows what was used), made (when the limit was, us)
local WIRE, WIRE_BYTES = '<dddddddddddd', 96

-- The tables of the first meters, used again by every call: to make and collect them took a tenth of
-- the script's time.
local KEPT_TABLES, kept_tables = 10, {}

local function table_for(i)
  local m = kept_tables[i] or {}
  if i <= KEPT_TABLES then kept_tables[i] = m end
  -- What not every call sets.
  m.began, m.is_known, m.is_full, m.left, m.reset = nil, nil, nil, nil, nil
  return m
end

local function meters()
  local found = {}
  for i = 1, #packed / WIRE_BYTES do
    local m = table_for(i)
    m.key, m.need, m.pace, m.used, m.told_limit, m.told_left, m.amount, m.burst, m.keep, m.per,
      m.slack, m.seeds, m.made = keys[i], struct.unpack(WIRE, packed, (i - 1) * WIRE_BYTES + 1)
    m.seeds = m.seeds == 1
    found[i] = m
  end
  return found
end

-- since    the epoch in which it began
-- all      when the bucket is full again (us)
-- back     the same for background work
-- each     what one unit takes of those two (us)
-- sum      used in the slots
-- oldest   no slot before this one
-- cap      the vendor's own limit, if lower; else NONE
-- mean     what a call uses (moving average), or NONE
-- want, want_til   so many units are left, until then, for a call that somebody waits for
-- big, big_til     the same for a large background call
-- line     when the next background call that is refused may ask again (us)
--
-- Packed, since a command takes longer with each field.
local STATE = '<ddddddddddddd'

local function state_of(m)
  return struct.pack(STATE, m.began, m.all, m.back, m.each, m.sum, m.oldest, m.cap, m.mean, m.want,
    m.want_til, m.big, m.big_til, m.line)
end

local function put_state(m) redis.call('HSET', m.key, 'state', state_of(m)) end

local function use(m, slot, units)
  -- What goes into the slot that was read is written with the rest, by put_rate.
  if slot == m.into then m.held = m.held + units
  else redis.call('HINCRBY', m.key, slot, units) end
  m.sum = m.sum + units
  m.oldest = math.min(m.oldest, slot)
end

local function forget_old(m)
  -- What fell out of the window no longer counts.
  local names = {}
  for slot = m.oldest, math.min(m.first, m.oldest + 2 * SLOTS) - 1 do
    names[#names + 1] = slot
  end
  for _, used in ipairs(redis.call('HMGET', m.key, unpack(names))) do
    m.sum = m.sum - (tonumber(used) or 0)
  end
  redis.call('HDEL', m.key, unpack(names))
  m.oldest = m.first
  put_state(m)
end

local function begin_again(m)
  -- The clock was set back, or the window is another one: all of it counts as used just now.
  m.all, m.back, m.oldest, m.held = now, now, m.slot, m.into == m.slot and m.sum or 0
  m.began, m.want, m.big, m.line, m.cap = m.since, 0, 0, 0, NONE
  redis.call('DEL', m.key)
  redis.call('HSET', m.key, 'state', state_of(m), m.slot, m.sum)
  redis.call('PEXPIRE', m.key, m.life)
end

local function keep_level(m)
  -- The limit is another one than before: what is in the bucket stays in it, a full one at most.
  m.all = now + math.min((m.all - now) / m.each, m.burst) * m.interval
  m.back = now + math.min((m.back - now) / m.each, m.burst) * m.interval
  m.each = m.interval
  put_state(m)
end

local function read_rate(m, since, at)
  m.width = math.ceil(m.per / SLOTS)
  m.slot = math.floor(now / m.width)
  m.first = m.slot - SLOTS - m.slack
  m.life = (SLOTS + m.slack + 2) * math.ceil(m.width / 1000)
  m.was = at and math.floor(at / m.width) or m.slot
  -- The slot that the call counts in: that of when it was let through, unless it is over.
  m.into = m.was >= m.first and m.was or m.slot
  local state, held = unpack(redis.call('HMGET', m.key, 'state', m.into))
  m.is_known = state and true or false
  m.cap, m.mean = NONE, NONE
  if state then
    m.began, m.all, m.back, m.each, m.sum, m.oldest, m.cap, m.mean, m.want, m.want_til, m.big,
      m.big_til, m.line = struct.unpack(STATE, state)
  end
  m.held = tonumber(held) or 0
  m.limit = m.amount
  if m.cap ~= NONE then m.amount = math.min(m.amount, m.cap) end
  m.burst = math.min(m.burst, m.amount)
  m.keep = math.min(m.keep, m.burst)
  m.interval = (m.per + (m.slack + 0.5) * m.width) / m.amount
  -- Nobody knows what was used before a loss of Redis.
  m.back_at = since + m.per + (m.slack + 1) * m.width
  m.is_lost = m.began ~= since and now < m.back_at
    -- What was used before the limit was made, no meter counted.
    or not m.is_known and now < m.made + m.per
  m.since = since
  if state then
    m.all, m.back = math.max(m.all, now), math.max(m.back, now)
    if m.each ~= m.interval then keep_level(m) end
  else
    m.all = now < m.back_at and math.max(since + m.burst * m.interval, now) or now
    m.back, m.sum, m.oldest, m.line = m.all, 0, m.slot, 0
    m.want, m.want_til, m.big, m.big_til = 0, now, 0, now
  end
  m.each = m.interval
  -- A claim that is over holds nothing back.
  if m.want_til <= now then m.want, m.want_til = 0, now end
  if m.big_til <= now then m.big, m.big_til = 0, now end
  if m.oldest > m.slot then begin_again(m) end
  if m.oldest < m.first then forget_old(m) end
  return m
end

local function charge(m, urgent, units)
  -- Background work never fills the bucket so far that the reserve is gone.
  m.back = m.back + units * m.interval
  if urgent then
    m.all = m.all + units * m.interval
  else
    m.all = math.max(m.all, math.min(m.all + units * m.interval,
      now + (m.burst - m.keep) * m.interval))
  end
end

local function put_rate(m)
  m.began = m.since
  redis.call('HSET', m.key, 'state', state_of(m), m.into, m.held)
end

-- Counts of the last slots of time: the retry budget's and the breaker's --------------------------

local function fields(first, last, names)
  local found = {}
  for _, name in ipairs(names) do
    for slot = first, last do found[#found + 1] = name .. slot end
  end
  return found
end

local function recent(key, width, slots, names)
  local number = math.floor(now / width)
  local counts = redis.call('HMGET', key, unpack(fields(number - slots + 1, number, names)))
  local totals = {}
  for i = 1, #names do
    totals[i] = 0
    for slot = 1, slots do
      totals[i] = totals[i] + (tonumber(counts[(i - 1) * slots + slot]) or 0)
    end
  end
  return unpack(totals)
end

local function count(key, width, slots, names, name)
  local number = math.floor(now / width)
  if redis.call('HINCRBY', key, name .. number, 1) == 1 then
    redis.call('HDEL', key, unpack(fields(number - 2 * slots - 1, number - slots, names)))
    redis.call('PEXPIRE', key, width * (slots + 1) / 1000)
  end
end

-- What is learnt of a model -----------------------------------------------------------------------

-- ratio    tokens a byte (moving average)
-- output   the tokens of an answer (the same)
-- p95      how long a call takes (ms)
-- high     what 95 % of the ratios stay below
local LEARNT = '<dddd'

local function learnt_in(kept)
  if not kept then return NONE, NONE, NONE, NONE end
  local ratio, output, slow, high = struct.unpack(LEARNT, kept)
  return ratio, output, slow, high
end

local function average(known, value, share)
  return known ~= NONE and known + share * (value - known) or value
end

local function p95(known, value, least)
  -- A step up for each larger value, a nineteenth of it down for each smaller one.
  if known == NONE then return value end
  local step = 0.05 * math.max(known, least)
  return value > known and known + 0.95 * step or known - 0.05 * step
end

local function learn(place, kept)
  local ratio, output, slow, high = learnt_in(kept)
  slow = p95(slow, args.ms, 1)
  if args.ratio > 0 then
    ratio = average(ratio, args.ratio, 0.05)
    high = p95(high, args.ratio, 1e-3)
  end
  if args.output > 0 then output = average(output, args.output, 0.1) end
  kept = struct.pack(LEARNT, ratio, output, slow, high)
  redis.call('SET', '{limits}:learnt:' .. place, kept, 'PX', WEEK_MS)
  return kept
end

-- The breaker -------------------------------------------------------------------------------------

-- state      open or half open
-- til        until when it lets nothing through (us)
-- cooldown   for how long it did so (us)
-- passed     probes that went well
local BREAKER, OPEN, HALF_OPEN = '<dddd', 1, 2

local function breaker_in(kept)
  if not kept then return NONE, 0, NONE, 0 end
  return struct.unpack(BREAKER, kept)
end

local function put_breaker(place, state, til, cooldown, passed)
  redis.call('SET', '{limits}:circuit:' .. place,
    struct.pack(BREAKER, state, til, cooldown, passed), 'PX', HOUR_MS)
end

local function open(place, cooldown)
  redis.call('DEL', '{limits}:health:' .. place)
  put_breaker(place, OPEN, now + cooldown, cooldown, 0)
  return 'opened'
end

local function settle_probe(place, is_fault, til, cooldown, passed)
  local probes = '{limits}:probes:' .. place
  if is_fault then
    redis.call('DEL', probes)
    return open(place, math.min(2 * cooldown, COOLDOWN_MOST))
  end
  if passed + 1 >= PROBES_TO_CLOSE then
    redis.call('DEL', '{limits}:circuit:' .. place, probes, '{limits}:health:' .. place)
    return 'closed'
  end
  put_breaker(place, HALF_OPEN, til, cooldown, passed + 1)
end

local function tell_breaker(place, kept, health, attempt)
  if kept then
    local state, til, cooldown, passed = breaker_in(kept)
    local was_probe = redis.call('ZREM', '{limits}:probes:' .. place, attempt) == 1
    if state == HALF_OPEN and was_probe and health ~= '' then
      return settle_probe(place, health == 'fault', til, cooldown, passed)
    end
    return nil
  end
  if health == '' then return nil end
  local key = '{limits}:health:' .. place
  count(key, BREAKER_SLOT, BREAKER_SLOTS, HEALTH, 'c')
  if health == 'fault' then
    count(key, BREAKER_SLOT, BREAKER_SLOTS, HEALTH, 'f')
    local calls, faults = recent(key, BREAKER_SLOT, BREAKER_SLOTS, HEALTH)
    if calls >= BREAKER_LEAST and faults * 2 >= calls then return open(place, COOLDOWN) end
  end
end

local function wait_for_breaker(place, kept)
  local state, til = breaker_in(kept)
  if state == OPEN and now < til then return til - now end
  local probes = '{limits}:probes:' .. place
  redis.call('ZREMRANGEBYSCORE', probes, '-inf', now)
  if redis.call('ZCARD', probes) >= PROBES then return 500000 end
  return 0
end

local function begin_probe(place, kept, attempt)
  local state, til, cooldown, passed = breaker_in(kept)
  local probes = '{limits}:probes:' .. place
  redis.call('ZADD', probes, now + args.lease, attempt)
  redis.call('PEXPIRE', probes, math.ceil(args.lease / 500))
  if state == OPEN then
    put_breaker(place, HALF_OPEN, til, cooldown, passed)
    return 'half_open'
  end
end

-- After a call ------------------------------------------------------------------------------------

local function tighten(m)
  -- The vendor allows less, or counts more than we do: others use the account.
  if m.told_limit <= m.limit then
    m.cap = m.told_limit
    local more = m.told_limit - m.told_left - m.sum
    if more > 0 then
      use(m, m.slot, more)
      redis.call('PEXPIRE', m.key, m.life)
    end
  else
    m.cap = NONE
  end
end

local function settle_rate(m, at, since)
  local is_told = m.told_limit >= 0
  if m.used == m.need and m.used == m.pace and not is_told then return end
  read_rate(m, since, at)
  if not m.is_known or m.is_lost then return end
  -- Into the slot of the call's start: the window shows what was used when.
  if m.was >= m.first then
    use(m, m.was, m.used - m.need)
    charge(m, args.urgent, m.used - m.pace)
  end
  if is_told then tighten(m) end
  if m.used > 0 then m.mean = average(m.mean, m.used, 0.1) end
  put_rate(m)
end

function operations.settle()
  if redis.call('DEL', '{limits}:taken:' .. args.attempt) == 0 then return { '{}', '' } end
  local place = args.place
  local known, breaker, learnt = unpack(redis.call('MGET', '{limits}:since',
    '{limits}:circuit:' .. place, '{limits}:learnt:' .. place))
  local since = epoch(known)
  for _, m in ipairs(meters()) do
    if m.per > 0 then settle_rate(m, args.at, since)
    else redis.call('ZREM', m.key, args.attempt) end
  end
  local event = tell_breaker(place, breaker, args.health, args.attempt)
  if args.gate > 0 then
    local gate = '{limits}:gate:' .. place
    if now + args.gate > tonumber(redis.call('GET', gate) or 0) then
      redis.call('SET', gate, now + args.gate, 'PX', math.ceil(args.gate / 1000))
    end
  end
  if args.error ~= '' then
    redis.call('HINCRBY', '{limits}:errors', place .. ' ' .. args.error, 1)
    if args.retried then
      redis.call('HINCRBY', '{limits}:retries', place .. ' ' .. args.error, 1)
    end
  end
  return { event and cjson.encode({ event = event }) or '{}',
    args.ms ~= NONE and learn(place, learnt) or '' }
end

-- Before a call -----------------------------------------------------------------------------------

local function wait_for_window(m, most)
  -- Until so much fell out of the window that the need fits.
  if m.sum + m.need <= most then return 0 end
  if m.need > most then return math.huge end
  local freed, slot = 0, m.oldest
  while slot < m.slot do
    freed = freed + (tonumber(redis.call('HGET', m.key, slot)) or 0)
    if m.sum - freed + m.need <= most then break end
    slot = slot + 1
  end
  return (slot + SLOTS + m.slack + 1) * m.width - now
end

local function wait_in_turn(m, urgent, most)
  -- Background work leaves what an urgent call, or a larger one, waits for.
  local wants, bigs = m.want, m.big > m.need and m.big or 0
  if urgent or wants + bigs == 0 then return wait_for_window(m, most) end
  local after_want = math.max(m.want_til - now, wait_for_window(m, most - bigs))
  local after_big = math.max(m.big_til - now, wait_for_window(m, most - wants))
  local after_both = math.max(m.want_til - now, m.big_til - now, wait_for_window(m, most))
  return math.min(wait_for_window(m, most - wants - bigs), after_want, after_big, after_both)
end

local function claim_room(found, wait)
  -- So that what is smaller or less urgent does not take, bit by bit, what this call waits for.
  if wait > args.patience then return end
  local til = now + wait * CLAIM_SHARE + CLAIM_US
  for _, m in ipairs(found) do
    if m.per > 0 and m.is_full and m.need >= (args.urgent and m.want or m.big) then
      if args.urgent then m.want, m.want_til = m.need, til else m.big, m.big_til = m.need, til end
      put_state(m)
    end
  end
end

local function stand_in_line(m, wait)
  -- Background calls that are refused ask again one after the other, as room comes. Who waited
  -- once is told the truth, as who is urgent.
  if args.urgent or args.waited or m.per == 0 or not m.is_known then return wait end
  local at = math.max(now + wait, m.line)
  if at - now <= args.patience then
    m.line = at + m.pace * m.interval
    put_state(m)
  end
  return at - now
end

local function left_to(urgent, m)
  -- What may be used of the window: background work leaves a hundredth, and is never shut out.
  if urgent or m.keep == 0 then return m.amount end
  return math.max(1, math.floor(m.amount - math.min(m.keep, m.amount / 100)))
end

local function wait_for_rate(m, urgent)
  if m.is_lost then return m.back_at - now end
  local keep = urgent and 0 or m.keep
  local most = left_to(urgent, m)
  -- A call that is larger than the limit waits for all of it.
  m.need = math.min(m.need, most)
  m.pace = math.min(m.pace, m.need)
  local wait = wait_in_turn(m, urgent, most)
  m.is_full = wait > 0 and m.is_known
  if m.burst < m.amount then
    -- Where any of the burst is left a call begins, and is charged for all that it is expected to
    -- use: else small ones would always be before a large one.
    local level = ((urgent and m.all or m.back) - now) / m.interval
    local over = level + math.min(m.pace, 1, m.burst - keep) - (m.burst - keep)
    -- Less than a microsecond is rounding.
    if over * m.interval > 1 then wait = math.max(wait, over * m.interval) end
  end
  return wait
end

local function take_rate(m, urgent)
  local is_first = m.held == 0
  charge(m, urgent, m.pace)
  use(m, m.slot, m.need)
  put_rate(m)
  if is_first then redis.call('PEXPIRE', m.key, m.life) end
  m.left = math.max(0, math.floor(m.amount - m.sum))
  m.reset = m.back - now
end

local function wait_for_slot(m, urgent, since)
  -- Those that ran out are removed where there is no room, and by every look.
  m.sum = redis.call('ZCOUNT', m.key, now, '+inf')
  -- After a loss of Redis the leases under way come back with their renewal.
  if now - since < args.quiet then return args.quiet - (now - since) end
  if m.sum + 1 > m.amount - (urgent and 0 or m.keep) then
    redis.call('ZREMRANGEBYSCORE', m.key, '-inf', now)
    return 100000
  end
  return 0
end

local function take_slot(m, attempt)
  redis.call('ZADD', m.key, now + args.lease, attempt)
  redis.call('PEXPIRE', m.key, math.ceil(args.lease / 500))
  m.left, m.reset = m.amount - m.sum - 1, 0
end

local function refused(wait, why, index)
  return cjson.encode({ wait = math.ceil(wait), why = why, index = index })
end

local function since_when(at) return struct.pack('<dd', at, now - at) end

local function granted(at, found, told)
  -- When it was let through, how long ago that is, and what each meter gave.
  local shown = { since_when(at) }
  for i, m in ipairs(found) do
    shown[i + 1] = struct.pack('<dddd', m.need, m.pace, m.left or NONE, m.reset or 0)
  end
  return { told and cjson.encode(told) or '{}', table.concat(shown) }
end

local function wait_for_meters(found, since)
  -- The longest wait and whose it is; or the meter that must be told what was used.
  local worst, index = 0, nil
  for i, m in ipairs(found) do
    local wait = 0
    if m.per > 0 then
      read_rate(m, since)
      if m.is_lost and m.seeds then
        local reader = redis.call('SET', (m.key:gsub(':meter:', ':seeding:', 1)), args.attempt,
          'NX', 'GET', 'PX', SEEDING_MS)
        -- Again to the one whose answer was lost; to another after one that died.
        if not reader or reader == args.attempt then return 0, nil, i end
        wait = 50000
      else
        wait = wait_for_rate(m, args.urgent)
      end
    else
      wait = wait_for_slot(m, args.urgent, since)
    end
    if wait > worst then worst, index = wait, i end
  end
  return worst, index
end

function operations.take()
  local marker = '{limits}:taken:' .. args.attempt
  local place = args.place
  local taken, gate, known, breaker = unpack(redis.call('MGET', marker, '{limits}:gate:' .. place,
    '{limits}:since', '{limits}:circuit:' .. place))
  if taken then return granted(tonumber(taken), meters()) end
  if gate and tonumber(gate) > now then return refused(gate - now, 'gate') end
  local wait = breaker and wait_for_breaker(place, breaker) or 0
  if wait > 0 then return refused(wait, 'breaker') end
  local tries = '{limits}:tries:' .. args.provider
  if args.again then
    local calls, again = recent(tries, TRIES_SLOT, TRIES_SLOTS, TRIES)
    if again + 1 > math.max(TRIES_LEAST, TRIES_SHARE * calls) then
      return refused(TRIES_SLOT / 2, 'retries')
    end
  end
  local found = meters()
  local worst, index, lost = wait_for_meters(found, epoch(known))
  if lost then return cjson.encode({ seed = lost }) end
  if worst > 0 then
    local told = stand_in_line(found[index], worst)
    if told == worst then claim_room(found, worst) end
    return refused(told, 'limit', index)
  end
  for _, m in ipairs(found) do
    if m.per > 0 then take_rate(m, args.urgent) else take_slot(m, args.attempt) end
  end
  count(tries, TRIES_SLOT, TRIES_SLOTS, TRIES, args.again and 'x' or 'c')
  redis.call('SET', marker, now, 'PX', args.life)
  local told = {}
  if breaker then told.probe, told.event = true, begin_probe(place, breaker, args.attempt) end
  if args.stats then told.stats = { learnt_in(redis.call('GET', '{limits}:learnt:' .. place)) } end
  return granted(now, found, next(told) and told)
end

-- Now and then ------------------------------------------------------------------------------------

local function wait_to_move(m, at, since)
  -- What is in the window still only moves within it.
  if m.per == 0 then return 0 end
  read_rate(m, since, at)
  if m.was >= m.first or m.is_lost then return 0 end
  return wait_for_window(m, math.max(m.amount, m.need))
end

local function move_rate(m)
  if m.is_lost or m.was >= m.slot then return end
  if m.was >= m.first then use(m, m.was, -m.need) end
  use(m, m.slot, m.need)
  put_rate(m)
  redis.call('PEXPIRE', m.key, m.life)
end

function operations.move()
  -- The call goes out later than it was let through: it counts from now.
  local marker = '{limits}:taken:' .. args.attempt
  local at, known = unpack(redis.call('MGET', marker, '{limits}:since'))
  if not at then return { '{}', since_when(now) } end
  local since = epoch(known)
  local found, worst, index = meters(), 0, nil
  for i, m in ipairs(found) do
    local wait = wait_to_move(m, tonumber(at), since)
    if wait > worst then worst, index = wait, i end
  end
  if worst > 0 then return refused(worst, 'limit', index) end
  for _, m in ipairs(found) do
    if m.per > 0 then move_rate(m) end
  end
  redis.call('SET', marker, now, 'PX', args.life)
  return { '{}', since_when(now) }
end

function operations.renew()
  -- One that ended meanwhile does not come back; after a loss of Redis all do.
  local since = epoch(redis.call('GET', '{limits}:since'))
  for i, attempt in ipairs(args.attempts) do
    if now - since < args.quiet then
      redis.call('ZADD', keys[i], now + args.lease, attempt)
    else
      redis.call('ZADD', keys[i], 'XX', now + args.lease, attempt)
    end
    redis.call('PEXPIRE', keys[i], math.ceil(args.lease / 500))
  end
  return '{}'
end

function operations.seed()
  -- What Postgres knows of the window, where nobody was faster.
  local m = meters()[1]
  local since = epoch(redis.call('GET', '{limits}:since'))
  read_rate(m, since)
  if not m.is_lost then return '{}' end
  redis.call('DEL', m.key)
  m.sum, m.held, m.oldest, m.line = 0, 0, m.slot, 0
  m.want, m.big, m.cap = 0, 0, NONE
  m.all = math.max(since + m.burst * m.interval, now)
  m.back = m.all
  for _, found in ipairs(args.used) do
    -- By this server's clock, and rather too late than too early.
    local slot = math.min(math.floor((found[1] + now - args.now) / m.width) + 1, m.slot)
    if slot >= m.first then use(m, slot, found[2]) end
  end
  put_rate(m)
  redis.call('PEXPIRE', m.key, m.life)
  redis.call('DEL', (m.key:gsub(':meter:', ':seeding:', 1)))
  return '{}'
end

local function freed_within(m, horizon)
  local last = math.floor((now + horizon) / m.width) - SLOTS - m.slack
  if last > m.slot then return m.sum end
  local freed = 0
  for slot = m.oldest, last - 1 do
    freed = freed + (tonumber(redis.call('HGET', m.key, slot)) or 0)
  end
  return freed
end

local function room_of(m, since)
  -- What may be used within the horizon, what is used now, and what a call uses. Nothing is kept
  -- back from who waits.
  if args.urgent then m.keep = 0 end
  if m.per == 0 then
    redis.call('ZREMRANGEBYSCORE', m.key, '-inf', now)
    local used = redis.call('ZCARD', m.key)
    return { m.amount - m.keep - used, used, 1, m.amount }
  end
  read_rate(m, since)
  local free = left_to(false, m) - m.sum + freed_within(m, args.horizon)
  if m.burst < m.amount then
    local level = ((m.keep == 0 and m.all or m.back) - now) / m.interval
    free = math.min(free, m.burst - m.keep - level + args.horizon / m.interval)
  end
  return { free, m.sum, m.mean, m.amount }
end

function operations.room()
  local rooms, places = {}, {}
  local since = epoch(redis.call('GET', '{limits}:since'))
  for i, m in ipairs(meters()) do rooms[i] = room_of(m, since) end
  for i, place in ipairs(args.places) do
    local breaker, gate, learnt = unpack(redis.call('MGET', '{limits}:circuit:' .. place,
      '{limits}:gate:' .. place, '{limits}:learnt:' .. place))
    local state, til = breaker_in(breaker)
    places[i] = { state == OPEN and 'open' or state == HALF_OPEN and 'half_open' or 'closed',
      math.max(0, til - now), math.max(0, (tonumber(gate) or 0) - now), learnt_in(learnt) }
  end
  return cjson.encode({ rooms = #rooms > 0 and rooms or cjson.null,
    places = #places > 0 and places or cjson.null })
end

redis.register_function(NAME, function(given_keys, given)
  local clock = redis.call('TIME')
  now = clock[1] * 1e6 + clock[2]
  keys, args, packed = given_keys, cjson.decode(given[2]), given[3]
  return operations[given[1]]()
end)
