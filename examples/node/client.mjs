// Streams one completion to stdout, and one line of figures to stderr.

import { readFileSync } from 'node:fs';
import { pipeline } from 'node:stream/promises';
import { fileURLToPath } from 'node:url';
import { parseArgs } from 'node:util';
import grpc from '@grpc/grpc-js';
import protoLoader from '@grpc/proto-loader';
import { explain } from './status.mjs';

const PROTO = new URL('../../proto/a2sf/inference/v1/inference.proto', import.meta.url);

const USAGE = `usage: node client.mjs PROMPT [--target HOST:PORT] [--max-new-tokens N]
  [--temperature T] [--ignore-eos] [--table NAME] [--timeout SECONDS]
  [--ca FILE [--token-file FILE]]`;

const OPTIONS = {
  target: { type: 'string', default: '127.0.0.1:50051' },
  'max-new-tokens': { type: 'string', default: '128' },
  temperature: { type: 'string' },
  'ignore-eos': { type: 'boolean' },
  table: { type: 'string' },
  timeout: { type: 'string', default: '300' },
  ca: { type: 'string' },
  'token-file': { type: 'string' },
};

// The channel itself repeats a call that was refused before it began, within the call's deadline;
// a server without room says in a trailer when. A stream that has begun is never repeated. Where the
// target has several addresses they take turns, repetitions included.
const SERVICE_CONFIG = {
  loadBalancingConfig: [{ round_robin: {} }],
  methodConfig: [
    {
      name: [{ service: 'a2sf.inference.v1.InferenceService' }],
      retryPolicy: {
        maxAttempts: 4,
        initialBackoff: '0.2s',
        maxBackoff: '2s',
        backoffMultiplier: 2,
        retryableStatusCodes: ['UNAVAILABLE', 'RESOURCE_EXHAUSTED'],
      },
    },
  ],
};

class UsageError extends Error {}

function readArguments() {
  let parsed;
  try {
    parsed = parseArgs({ options: OPTIONS, allowPositionals: true });
  } catch (error) {
    throw new UsageError(error.message);
  }
  const { values, positionals } = parsed;
  if (positionals.length !== 1) throw new UsageError(`${positionals.length} prompts; give one`);
  if (values['token-file'] && !values.ca) {
    throw new UsageError('--token-file needs --ca: a token is never sent in plain text');
  }
  const number = (flag, pattern, accepted) => {
    const text = values[flag];
    if (text === undefined || pattern.test(text)) return text && Number(text);
    throw new UsageError(`--${flag} ${text}: not ${accepted}`);
  };
  const decimal = [/^\d+(\.\d+)?$/, 'a number such as 0.7'];
  return {
    // What is undefined is not sent, and the server's own settings stand in for it.
    input: {
      text: positionals[0],
      // Checked here because protobufjs would send -1 as 4294967295.
      maxNewTokens: number('max-new-tokens', /^\d{1,9}$/, 'a whole number of at most 9 digits'),
      sampling: { temperature: number('temperature', ...decimal) },
      ignoreEos: values['ignore-eos'],
      cachePolicy: { table: values.table },
    },
    timeoutMs: 1000 * number('timeout', ...decimal),
    ...values,
  };
}

function credentials({ ca, 'token-file': tokenFile }) {
  if (!ca) return grpc.credentials.createInsecure();
  const channel = grpc.credentials.createSsl(readFileSync(ca));
  if (!tokenFile) return channel;
  const metadata = new grpc.Metadata();
  metadata.set('authorization', `Bearer ${readFileSync(tokenFile, 'utf8').trim()}`);
  return grpc.credentials.combineChannelCredentials(
    channel,
    grpc.credentials.createFromMetadataGenerator((_, done) => done(null, metadata)),
  );
}

function figures({ reason, usage, cache }) {
  const why = reason.replace('FINISH_REASON_', '').toLowerCase();
  return (
    `${usage.completionTokens} tokens (${why}); each head kept ${cache.keptTokens} of ` +
    `${cache.keptTokens + cache.evictedTokens} tokens on average, evicted ${cache.evictedTokens}`
  );
}

async function main() {
  const { input, timeoutMs, ...options } = readArguments();
  const { a2sf } = grpc.loadPackageDefinition(
    protoLoader.loadSync(fileURLToPath(PROTO), { enums: String, longs: String, defaults: true }),
  );
  const client = new a2sf.inference.v1.InferenceService(options.target, credentials(options), {
    'grpc.service_config': JSON.stringify(SERVICE_CONFIG),
  });
  const call = client.StreamGenerate({ input }, { deadline: Date.now() + timeoutMs });
  process.once('SIGINT', () => {
    process.exitCode = 130;
    call.cancel();
  });
  let finished;
  try {
    await pipeline(
      call,
      async function* (responses) {
        for await (const response of responses) {
          if (response.delta) yield response.delta.text;
          if (response.finished) finished = response.finished;
        }
        yield '\n';
      },
      process.stdout,
      { end: false },
    );
    console.error(figures(finished));
  } finally {
    // Whatever ended this side, such as a reader of stdout that left, ends the server's work too.
    call.cancel();
    client.close();
  }
}

try {
  await main();
} catch (error) {
  process.exitCode ??= 1;
  if (error instanceof UsageError) console.error(`error: ${error.message}\n${USAGE}`);
  else if (error.metadata) console.error(`error: ${explain(error).join('\n')}`);
  else if (error.code !== 'EPIPE') console.error(`error: ${error.message}`);
}
