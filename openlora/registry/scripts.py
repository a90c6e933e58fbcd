"""The Lua scripts of the registry, each with its contract. Every one is one atomic change.

Keys (one hash slot): ``index`` (hash: key → newest record, ``<key>#version`` → last version given
out, which outlives a removal: an ID that comes back repeats none), ``versions`` (hash of one key:
version → record), ``contents`` (hash: content hash → versions that name it), ``dropped`` (sorted
set: content that no version names any more, by when it lost the last one, in Unix ms),
``revision`` (count of changes), ``pins`` (set of keys that workers keep in pages).

A change is published as ``<revision> <key>``: who misses a number reads everything anew.

PUT       KEYS index, versions, contents, dropped, revision, pins
          ARGV channel, key, record with version 0, content hash, owner, now in ms, versions kept
          The same content as the newest version changes nothing. → {"stored"|"same", record} |
          {"forbidden", owner}
REMOVE    KEYS as PUT        ARGV channel, key, owner, now in ms, version ("" for all)
          The version that requests get can go only with all others. → {"removed"} |
          {"missing"} | {"current"} | {"forbidden", owner}
ROLLBACK  KEYS as PUT        ARGV channel, key, owner, now in ms, version ("" for the one before)
          Requests get this version from now on. → {"stored", record} | {"missing"} |
          {"forbidden", owner}
PIN       KEYS as PUT        ARGV channel, key, "1" or "0"
          Workers keep whatever version is in use in pages, or no more. → {"stored", record} |
          {"missing"}
"""

from __future__ import annotations

_COMMON = """
local index, versions, contents, dropped, revision = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5]
local channel, key = ARGV[1], ARGV[2]

local function field(record, name)
  return cjson.decode(record)[name]
end

local function owner_of(record)
  local owner = field(record, 'owner')
  if owner == nil or owner == '' then return 'default' end
  return owner
end

local function publish()
  redis.call('PUBLISH', channel, redis.call('INCR', revision) .. ' ' .. key)
end

local function name_content(hash)
  redis.call('HINCRBY', contents, hash, 1)
  redis.call('ZREM', dropped, hash)
end

local function drop_version(version, now_ms)
  local record = redis.call('HGET', versions, version)
  redis.call('HDEL', versions, version)
  local hash = field(record, 'hash')
  if redis.call('HINCRBY', contents, hash, -1) <= 0 then
    redis.call('HDEL', contents, hash)
    redis.call('ZADD', dropped, now_ms, hash)
  end
end

local function sorted_versions()
  local found = redis.call('HKEYS', versions)
  for i = 1, #found do found[i] = tonumber(found[i]) end
  table.sort(found)
  return found
end

local newest = redis.call('HGET', index, key)
if newest and redis.call('HEXISTS', versions, field(newest, 'version')) == 0 then
  -- written before versions were kept
  redis.call('HSET', versions, field(newest, 'version'), newest)
  name_content(field(newest, 'hash'))
end
"""

PUT = (
    _COMMON
    + """
local record, hash, owner, now_ms, kept = ARGV[3], ARGV[4], ARGV[5], ARGV[6], tonumber(ARGV[7])
if newest then
  if owner_of(newest) ~= owner then return {'forbidden', owner_of(newest)} end
  if field(newest, 'hash') == hash then return {'same', newest} end
end
local version = tonumber(redis.call('HGET', index, key .. '#version') or '0') + 1
-- the ID before it holds no quotes, so the first match is the field itself
record = string.gsub(record, '"version":0', '"version":' .. version, 1)
redis.call('HSET', index, key, record, key .. '#version', version)
redis.call('HSET', versions, version, record)
name_content(hash)
local found = sorted_versions()
for i = 1, #found - kept do drop_version(found[i], now_ms) end
publish()
return {'stored', record}
"""
)

REMOVE = (
    _COMMON
    + """
local owner, now_ms, version = ARGV[3], ARGV[4], ARGV[5]
if not newest then return {'missing'} end
if owner_of(newest) ~= owner then return {'forbidden', owner_of(newest)} end
if version == '' then
  local found = sorted_versions()
  for i = 1, #found do drop_version(found[i], now_ms) end
  redis.call('HDEL', index, key)
  redis.call('SREM', KEYS[6], key)
else
  if redis.call('HEXISTS', versions, version) == 0 then return {'missing'} end
  if tostring(field(newest, 'version')) == version then return {'current'} end
  drop_version(version, now_ms)
end
publish()
return {'removed'}
"""
)

ROLLBACK = (
    _COMMON
    + """
local owner, version = ARGV[3], tonumber(ARGV[5])
if not newest then return {'missing'} end
if owner_of(newest) ~= owner then return {'forbidden', owner_of(newest)} end
local now_used = field(newest, 'version')
if not version then
  local found = sorted_versions()
  for i = 1, #found do
    if found[i] < now_used then version = found[i] end
  end
end
local record = version and redis.call('HGET', versions, version)
if not record then return {'missing'} end
if version ~= now_used then
  redis.call('HSET', index, key, record)
  publish()
end
return {'stored', record}
"""
)

PIN = (
    _COMMON
    + """
if not newest then return {'missing'} end
local change = ARGV[3] == '1' and 'SADD' or 'SREM'
if redis.call(change, KEYS[6], key) == 1 then publish() end
return {'stored', newest}
"""
)
