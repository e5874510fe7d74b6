// Reads a failed call to the end: its code, its message, and the details in its trailers.
// Knows nothing of any service.

import { fileURLToPath } from 'node:url';
import grpc from '@grpc/grpc-js';
import protoLoader from '@grpc/proto-loader';

const { 'google.rpc.Status': Status } = protoLoader.loadSync(
  fileURLToPath(new URL('status.proto', import.meta.url)),
  // With `json`, each google.protobuf.Any whose type is in status.proto arrives decoded.
  { json: true, longs: Number, defaults: true },
);

const SHOW = {
  'type.googleapis.com/google.rpc.BadRequest': ({ fieldViolations }) =>
    fieldViolations.map(({ field, description }) => `${field}: ${description}`),
  'type.googleapis.com/google.rpc.RetryInfo': ({ retryDelay: { seconds, nanos } }) =>
    [`come back in ${seconds + nanos / 1e9} s`],
};

/** The lines that tell a person why a call failed; `error` is grpc-js's ServiceError. */
export function explain(error) {
  const [packed] = error.metadata.get('grpc-status-details-bin');
  const details = packed ? Status.deserialize(packed).details : [];
  return [
    `${grpc.status[error.code]}: ${error.details}`,
    ...details.flatMap((detail) => SHOW[detail['@type']]?.(detail) ?? []).map((line) => `  ${line}`),
  ];
}
