-- Every limit of a call, the vendor's gate and the breaker, in one step on the server's clock.
--
-- All keys share the slot of the hash tag {limits}, since a call takes its provider's, its
-- tenant's and its key's limits at once or none.
--
-- key                                type    what                                       lives
-- {limits}:epoch                     string  since when Redis remembers (us)            for ever
-- {limits}:meter:<limit>[:<who>]     hash    tat     when the bucket is full again (us) window
--                                            sum     used in the slots below
--                                            oldest  no slot before this one
--                                            cap     the vendor's own limit, if lower
--                                            mean    what a call uses (moving average)
--                                            <n>     used in the n-th 120th of the window
--                                    zset    calls at once: attempt -> its lease's end  leases
-- {limits}:gate:<place>              string  closed until (us)                          until then
-- {limits}:breaker:<place>           hash    state, until, cooldown, passed; of six     an hour
--                                            5 s: n<i> which, c<i> calls, f<i> faults
-- {limits}:probes:<place>            zset    half-open: attempt -> its lease's end      leases
-- {limits}:stats:<place>             hash    ratio, output, p95 (moving estimates)      a week
-- {limits}:tries:<provider>          hash    of six 10 s: n<i> which, c<i>, x<i> again  minutes
-- {limits}:errors                    hash    <place> <error class> -> count             for ever
-- {limits}:taken:<attempt>           string  granted at (us)                            the call
--
-- <place> is <provider>/<model>. Times are microseconds of the server's clock.
--
-- A rate has two meters. The bucket (GCRA) spreads the window's amount evenly, with a burst. The
-- slots count what was used in any window: never more than the amount, whatever was estimated,
-- settled or used in bursts. ARGV: the operation, then its arguments as JSON.

local SLOTS = 120
local BREAKER_SLOT, BREAKER_SLOTS, BREAKER_LEAST = 5e6, 6, 20
local COOLDOWN, COOLDOWN_MOST = 10e6, 120e6
local PROBES, PROBES_TO_CLOSE = 3, 2
local TRIES_SLOT, TRIES_SLOTS, TRIES_LEAST, TRIES_SHARE = 10e6, 6, 10, 0.2
local WEEK_MS, HOUR_MS = 604800000, 3600000

local clock = redis.call('TIME')
local now = clock[1] * 1e6 + clock[2]
local args = cjson.decode(ARGV[2])

local function text(number) return string.format('%.0f', number) end

local function epoch()
  local since = redis.call('GET', '{limits}:epoch')
  if not since then
    redis.call('SET', '{limits}:epoch', text(now))
    return now
  end
  return tonumber(since)
end

-- Rates ------------------------------------------------------------------------------------------
-- m: key, need (reserved), pace (expected), amount, burst, keep (what background work leaves),
--    per (window, us), slack (slots)

local function forget_old(m)
  -- What fell out of the window no longer counts.
  if m.oldest < m.first then
    local names = {}
    for slot = m.oldest, math.min(m.first, m.oldest + 2 * SLOTS) - 1 do
      names[#names + 1] = text(slot)
    end
    for _, used in ipairs(redis.call('HMGET', m.key, unpack(names))) do
      m.sum = m.sum - (tonumber(used) or 0)
    end
    redis.call('HDEL', m.key, unpack(names))
    m.oldest = m.first
    redis.call('HSET', m.key, 'sum', text(m.sum), 'oldest', text(m.oldest))
  end
end

local function read_rate(m, since)
  local tat, sum, oldest, cap, mean = unpack(
    redis.call('HMGET', m.key, 'tat', 'sum', 'oldest', 'cap', 'mean'))
  m.width = m.per / SLOTS
  m.slot = math.floor(now / m.width)
  m.first = m.slot - SLOTS - m.slack
  m.amount = math.min(m.amount, tonumber(cap) or m.amount)
  m.burst = math.min(m.burst, m.amount)
  m.interval = (m.per + (m.slack + 0.5) * m.width) / m.amount
  m.mean = tonumber(mean)
  m.sum = tonumber(sum) or 0
  m.oldest = tonumber(oldest) or m.slot
  -- After a loss of Redis nobody knows what was used: the bucket starts empty.
  local start = (not tat and now - since < m.per) and since + m.burst * m.interval or now
  m.tat = math.max(tonumber(tat) or start, now)
  forget_old(m)
  return m
end

local function wait_for_window(m, most)
  -- Until so much fell out of the window that the need fits.
  local freed, slot = 0, m.oldest
  while slot <= m.slot do
    freed = freed + (tonumber(redis.call('HGET', m.key, text(slot))) or 0)
    if m.sum - freed + m.need <= most then break end
    slot = slot + 1
  end
  return math.max((slot + SLOTS + m.slack + 1) * m.width - now, 1000)
end

local function wait_for_rate(m, urgent)
  local keep = urgent and 0 or m.keep
  -- A call that is larger than the limit waits for all of it.
  local most = m.amount - math.min(keep, m.amount / 100)
  m.need = math.min(m.need, math.floor(most))
  m.pace = math.min(m.pace, m.need)
  local wait = 0
  if m.sum + m.need > most then wait = wait_for_window(m, most) end
  if m.burst < m.amount then
    local burst = m.burst - keep
    local level = (m.tat - now) / m.interval
    local over = level + math.min(m.pace, burst) - burst
    -- Less than a millionth of a unit is rounding.
    if over > 1e-6 then wait = math.max(wait, over * m.interval) end
  end
  return wait
end

local function take_rate(m)
  redis.call('HINCRBY', m.key, text(m.slot), text(m.need))
  redis.call('HSET', m.key, 'tat', text(m.tat + m.pace * m.interval),
    'sum', text(m.sum + m.need), 'oldest', text(m.oldest))
  redis.call('PEXPIRE', m.key, text((m.per + (m.slack + 2) * m.width) / 1000))
  m.left = math.max(0, math.floor(m.amount - m.sum - m.need))
  m.reset = m.tat + m.pace * m.interval - now
end

-- Calls at once ----------------------------------------------------------------------------------

local function wait_for_slot(m, urgent, since)
  redis.call('ZREMRANGEBYSCORE', m.key, '-inf', text(now))
  m.sum = redis.call('ZCARD', m.key)
  -- After a loss of Redis the leases under way come back with their renewal.
  if now - since < args.lease / 4 then return 250000 end
  if m.sum + 1 > m.amount - (urgent and 0 or m.keep) then return 100000 end
  return 0
end

local function take_slot(m, attempt)
  redis.call('ZADD', m.key, text(now + args.lease), attempt)
  redis.call('PEXPIRE', m.key, text(args.lease / 1000 * 2))
  m.left, m.reset = m.amount - m.sum - 1, 0
end

-- Counts in a ring of slots: the retry budget's and the breaker's -----------------------------------

local function ring(key, width, slots, names)
  local h = {}
  local flat = redis.call('HGETALL', key)
  for i = 1, #flat, 2 do h[flat[i]] = flat[i + 1] end
  local number = math.floor(now / width)
  local totals = {}
  for _, name in ipairs(names) do totals[name] = 0 end
  for i = 0, slots - 1 do
    local age = number - (tonumber(h['n' .. i]) or -slots)
    if age < slots then
      for _, name in ipairs(names) do
        totals[name] = totals[name] + (tonumber(h[name .. i]) or 0)
      end
    end
  end
  return h, totals, number
end

local function count(key, h, number, slots, adds, life)
  local i = number % slots
  local fresh = tonumber(h['n' .. i]) ~= number
  local values = { 'n' .. i, text(number) }
  for name, add in pairs(adds) do
    values[#values + 1] = name .. i
    values[#values + 1] = text((fresh and 0 or tonumber(h[name .. i]) or 0) + add)
  end
  redis.call('HSET', key, unpack(values))
  redis.call('PEXPIRE', key, life)
end

-- The breaker ------------------------------------------------------------------------------------

local function wait_for_breaker(place)
  local state, til = unpack(redis.call('HMGET', '{limits}:breaker:' .. place, 'state', 'until'))
  if state ~= 'open' and state ~= 'half_open' then return 0, false end
  if state == 'open' and now < tonumber(til) then return tonumber(til) - now, false end
  local probes = '{limits}:probes:' .. place
  redis.call('ZREMRANGEBYSCORE', probes, '-inf', text(now))
  if redis.call('ZCARD', probes) >= PROBES then return 500000, false end
  return 0, true, state
end

local function open(key, cooldown)
  redis.call('DEL', key)
  redis.call('HSET', key, 'state', 'open', 'until', text(now + cooldown), 'cooldown',
    text(cooldown))
  redis.call('PEXPIRE', key, HOUR_MS)
  return 'opened'
end

local function settle_probe(key, probes, is_fault)
  local cooldown, passed = unpack(redis.call('HMGET', key, 'cooldown', 'passed'))
  if is_fault then
    redis.call('DEL', probes)
    return open(key, math.min(2 * (tonumber(cooldown) or COOLDOWN), COOLDOWN_MOST))
  end
  if (tonumber(passed) or 0) + 1 >= PROBES_TO_CLOSE then
    redis.call('DEL', key, probes)
    return 'closed'
  end
  redis.call('HINCRBY', key, 'passed', 1)
end

local function tell_breaker(place, is_fault, attempt)
  local key, probes = '{limits}:breaker:' .. place, '{limits}:probes:' .. place
  local was_probe = redis.call('ZREM', probes, attempt) == 1
  local h, totals, number = ring(key, BREAKER_SLOT, BREAKER_SLOTS, { 'c', 'f' })
  if h.state == 'half_open' then
    return was_probe and settle_probe(key, probes, is_fault) or nil
  end
  if h.state == 'open' then return nil end
  local calls, faults = totals.c + 1, totals.f + (is_fault and 1 or 0)
  if is_fault and calls >= BREAKER_LEAST and faults * 2 >= calls then
    return open(key, COOLDOWN)
  end
  count(key, h, number, BREAKER_SLOTS, { c = 1, f = is_fault and 1 or 0 }, HOUR_MS)
end

-- Operations -------------------------------------------------------------------------------------

local function meters()
  for i, m in ipairs(args.meters) do m.key = KEYS[i] end
  return args.meters
end

local function stats(place)
  local found = redis.call('HMGET', '{limits}:stats:' .. place, 'ratio', 'output', 'p95')
  return { found[1] or '', found[2] or '', found[3] or '' }
end

local function refused(wait, why, index)
  return cjson.encode({ wait = math.ceil(wait), why = why, index = index })
end

local function granted(at, probe, event)
  local shown = {}
  for i, m in ipairs(args.meters) do shown[i] = { m.need, m.pace, m.left or -1, m.reset or 0 } end
  if #shown == 0 then shown = cjson.null end
  return cjson.encode({ at = text(at), probe = probe, event = event, meters = shown,
    stats = stats(args.place) })
end

local operations = {}

function operations.take()
  local marker = '{limits}:taken:' .. args.attempt
  local before = redis.call('GET', marker)
  if before then return granted(tonumber(before), false) end
  local gate = tonumber(redis.call('GET', '{limits}:gate:' .. args.place) or 0)
  if gate > now then return refused(gate - now, 'gate') end
  local wait, probe, state = wait_for_breaker(args.place)
  if wait > 0 then return refused(wait, 'breaker') end
  local tries = '{limits}:tries:' .. args.provider
  local h, totals, number = ring(tries, TRIES_SLOT, TRIES_SLOTS, { 'c', 'x' })
  if args.again and totals.x + 1 > math.max(TRIES_LEAST, TRIES_SHARE * totals.c) then
    return refused(TRIES_SLOT / 2, 'retries')
  end
  local since = epoch()
  local worst, index = 0, nil
  for i, m in ipairs(meters()) do
    if m.per > 0 and m.seeds and now - since < m.per and redis.call('EXISTS', m.key) == 0 then
      return cjson.encode({ seed = i })
    end
    local waits = m.per > 0 and wait_for_rate(read_rate(m, since), args.urgent)
      or (m.per == 0 and wait_for_slot(m, args.urgent, since))
    if waits > worst then worst, index = waits, i end
  end
  if worst > 0 then return refused(worst, 'limit', index) end
  for _, m in ipairs(args.meters) do
    if m.per > 0 then take_rate(m) else take_slot(m, args.attempt) end
  end
  count(tries, h, number, TRIES_SLOTS, args.again and { c = 0, x = 1 } or { c = 1, x = 0 }, 120000)
  redis.call('SET', marker, text(now), 'PX', text(args.life / 1000))
  local event
  if probe then
    redis.call('ZADD', '{limits}:probes:' .. args.place, text(now + args.lease), args.attempt)
    redis.call('PEXPIRE', '{limits}:probes:' .. args.place, text(args.lease / 1000 * 2))
    if state == 'open' then
      redis.call('HSET', '{limits}:breaker:' .. args.place, 'state', 'half_open')
      event = 'half_open'
    end
  end
  return granted(now, probe, event)
end

local function settle_rate(m, at)
  if m.used == m.need and m.used == m.pace then return end
  -- Into the slot of the call's start: the window shows what was used when.
  local by = m.used - m.need
  local state = read_rate(m, 0)
  local slot = math.floor(at / m.width)
  if slot >= state.first then
    redis.call('HINCRBY', m.key, text(slot), text(by))
    redis.call('HSET', m.key, 'sum', text(state.sum + by), 'oldest',
      text(math.min(state.oldest, slot)), 'tat', text(state.tat + (m.used - m.pace) * m.interval))
    redis.call('PEXPIRE', m.key, text((m.per + (m.slack + 2) * m.width) / 1000))
  end
  if m.used > 0 then
    local mean = state.mean and state.mean + 0.1 * (m.used - state.mean) or m.used
    redis.call('HSET', m.key, 'mean', string.format('%.3f', mean))
  end
end

local function tighten(m)
  -- The vendor counts more than we do, or allows less: others use the account, or it was lowered.
  if m.told == nil then return end
  local limit, left = m.told[1], m.told[2]
  if limit > m.limit then return end
  local state = read_rate(m, 0)
  redis.call('HSET', m.key, 'cap', text(limit))
  local more = (limit - left) - state.sum
  if more > 0 then
    redis.call('HINCRBY', m.key, text(state.slot), text(more))
    redis.call('HSET', m.key, 'sum', text(state.sum + more), 'oldest', text(state.oldest),
      'tat', text(state.tat))
    redis.call('PEXPIRE', m.key, text((m.per + (m.slack + 2) * m.width) / 1000))
  end
end

local function learn(key, name, value, share)
  if value == nil or value <= 0 then return end
  local known = tonumber(redis.call('HGET', key, name))
  local new = known and known + share * (value - known) or value
  redis.call('HSET', key, name, string.format('%.4f', new))
end

local function learn_p95(key, ms)
  -- A step up for each slower call, a nineteenth of it down for each faster one.
  local known = tonumber(redis.call('HGET', key, 'p95'))
  local new = ms
  if known then
    local step = 0.05 * math.max(known, 1)
    new = ms > known and known + 0.95 * step or known - 0.05 * step
  end
  redis.call('HSET', key, 'p95', string.format('%.1f', new))
end

function operations.settle()
  local marker = '{limits}:taken:' .. args.attempt
  if not redis.call('GET', marker) then return cjson.encode({}) end
  redis.call('DEL', marker)
  local at = tonumber(args.at)
  for _, m in ipairs(meters()) do
    if m.per == 0 then
      redis.call('ZREM', m.key, args.attempt)
    else
      settle_rate(m, at)
      tighten(m)
    end
  end
  local place, event = args.place, nil
  if args.health == 'ok' or args.health == 'fault' then
    event = tell_breaker(place, args.health == 'fault', args.attempt)
  else
    redis.call('ZREM', '{limits}:probes:' .. place, args.attempt)
  end
  if args.gate and args.gate > 0 then
    local gate = '{limits}:gate:' .. place
    if now + args.gate > tonumber(redis.call('GET', gate) or 0) then
      redis.call('SET', gate, text(now + args.gate), 'PX', text(args.gate / 1000 + 1))
    end
  end
  if args.error then redis.call('HINCRBY', '{limits}:errors', place .. ' ' .. args.error, 1) end
  if args.ms then
    local key = '{limits}:stats:' .. place
    learn(key, 'ratio', args.ratio, 0.05)
    learn(key, 'output', args.output, 0.1)
    learn_p95(key, args.ms)
    redis.call('PEXPIRE', key, WEEK_MS)
  end
  return cjson.encode({ event = event })
end

function operations.renew()
  for i, attempt in ipairs(args.attempts) do
    redis.call('ZADD', KEYS[i], text(now + args.lease), attempt)
    redis.call('PEXPIRE', KEYS[i], text(args.lease / 1000 * 2))
  end
  return cjson.encode({})
end

function operations.seed()
  -- What Postgres knows of the window, where nobody was faster.
  local m = meters()[1]
  if redis.call('EXISTS', m.key) == 1 then return cjson.encode({}) end
  local state = read_rate(m, 0)
  local sum, oldest = 0, state.slot
  for _, found in ipairs(args.used) do
    local slot = math.floor(found[1] / m.width)
    if slot >= state.first and slot <= state.slot then
      redis.call('HINCRBY', m.key, text(slot), text(found[2]))
      sum, oldest = sum + found[2], math.min(oldest, slot)
    end
  end
  redis.call('HSET', m.key, 'tat', text(now), 'sum', text(sum), 'oldest', text(oldest))
  redis.call('PEXPIRE', m.key, text((m.per + (m.slack + 2) * m.width) / 1000))
  return cjson.encode({})
end

local function room_of(m, since)
  -- What may be used within the horizon, what is used now, and what a call uses.
  if m.per == 0 then
    redis.call('ZREMRANGEBYSCORE', m.key, '-inf', text(now))
    local used = redis.call('ZCARD', m.key)
    return { m.amount - m.keep - used, used, 1, m.amount }
  end
  read_rate(m, since)
  local soon = 0
  if args.horizon > 0 then
    local last = math.floor((now + args.horizon) / m.width) - SLOTS - m.slack
    for slot = m.oldest, math.min(last, m.slot) - 1 do
      soon = soon + (tonumber(redis.call('HGET', m.key, text(slot))) or 0)
    end
  end
  local free = m.amount - math.min(m.keep, m.amount / 100) - m.sum + soon
  if m.burst < m.amount then
    local level = (m.tat - now) / m.interval
    free = math.min(free, m.burst - m.keep - level + args.horizon / m.interval)
  end
  return { free, m.sum, m.mean or -1, m.amount }
end

function operations.room()
  local rooms, places = {}, {}
  local since = epoch()
  for i, m in ipairs(meters()) do rooms[i] = room_of(m, since) end
  for i, place in ipairs(args.places) do
    local state, til = unpack(redis.call('HMGET', '{limits}:breaker:' .. place, 'state', 'until'))
    local gate = tonumber(redis.call('GET', '{limits}:gate:' .. place) or 0)
    local found = stats(place)
    places[i] = { state or 'closed', math.max(0, (tonumber(til) or 0) - now),
      math.max(0, gate - now), found[1], found[2], found[3] }
  end
  return cjson.encode({ rooms = #rooms > 0 and rooms or cjson.null,
    places = #places > 0 and places or cjson.null })
end

return operations[ARGV[1]]()
